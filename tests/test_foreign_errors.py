"""Nothing ends in an error of another library: families x scopes x modes x what there is to do.

What is not served is refused by a `SteerError`. A mode that transformers itself does not run for a family is left out.
`python -m tests.test_foreign_errors llama mamba` does the same for some families, without pytest.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit
from steerkit import export
from steerkit.errors import SteerError
from steerkit.network.sites import KINDS
from steerkit.vector.steering_vector import SteeringVector
from tests import modes
from tests.families import FAMILIES, FURTHER, build
from tests.tiny_tokenizers import TEMPLATES, byte_tokenizer

SCOPES = ("response", "all", "prompt", "generated", "first(4)", "front", "assistant", "answer", "after(0)")
TOKENIZER = byte_tokenizer(TEMPLATES["chatml"])
DATA = steerkit.ContrastSet.from_answers(
    [("How are you?", "Fine, thank you.", "Bad."), ("And the cat?", "It purrs.", "It is ill, sadly.")]
)
LENGTHS = {"right_padded_forward": [len(modes.SHORT), len(modes.LONG), 4]}


class Tried:
    """What was tried on one family: how often, what was refused, and which foreign errors came."""

    def __init__(self) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.foreign: list[str] = []

    def __call__(self, where: str, act: Callable[[], Any]) -> Any:
        """Do something; None where it is refused or fails."""
        try:
            done = act()
        except SteerError as error:
            assert "\n" not in str(error), error
            self.outcomes["refused"] += 1
            return None
        except Exception as error:  # noqa: BLE001 - what is counted
            self.outcomes["foreign"] += 1
            self.foreign.append(f"{where}: {type(error).__name__}: {error}"[:300].replace("\n", " "))
            return None
        self.outcomes["done"] += 1
        return done


def runs(model: Any, mode: str) -> bool:
    """Whether transformers runs a mode for a model that nobody steers."""
    with contextlib.suppress(Exception), torch.no_grad():
        return bool(modes.MODES[mode](model))
    return False


@torch.no_grad()
def steered(model: Any, vector: SteeringVector, scope: str, mode: str, monitor: steerkit.Monitor | None = None) -> None:
    context = steerkit.steer(model, vector, 1.0, scope=scope, tokenizer=TOKENIZER, prompt_lengths=LENGTHS.get(mode))
    with context, contextlib.nullcontext() if monitor is None else monitor.watch():
        modes.MODES[mode](model)


@torch.no_grad()
def edited(model: Any, vector: SteeringVector, mode: str) -> None:
    with steerkit.edited(model, vector):
        modes.MODES[mode](model)


def bake(model: Any, vector: SteeringVector) -> None:
    with tempfile.TemporaryDirectory() as folder:
        export.bake(model, TOKENIZER, vector, Path(folder) / "out", untie=True)


def fitted(model: Any, tried: Tried) -> dict[str, SteeringVector]:
    """A vector for each kind of site that the first two blocks have, each also recorded."""
    found = {}
    for kind in KINDS:
        for site in (f"{kind}.0", f"{kind}.1"):
            tried(f"record {site}", lambda site=site: steerkit.record(model, TOKENIZER, DATA, [site]))
            vector = tried(f"fit {site}", lambda site=site: steerkit.fit(model, TOKENIZER, DATA, sites=[site]))
            if vector is not None:
                found[kind] = vector
    return found


def exhaust(family: str) -> Tried:
    """Do everything to one family."""
    tried, model = Tried(), build(family)
    neutral = [item for side in (DATA.positive, DATA.negative) for item in side]
    vectors = list(fitted(model, tried).values())
    ways = [mode for mode in modes.MODES if runs(model, mode)]
    monitors = [
        tried("monitor", lambda one=one: steerkit.Monitor(model, TOKENIZER, one, neutral=neutral)) for one in vectors
    ]
    for monitor in filter(None, monitors):
        tried("score", lambda monitor=monitor: monitor.score(["How is it?", "Well"]))
    for number, (scope, mode) in enumerate((scope, mode) for scope in SCOPES for mode in ways):
        one, monitor = vectors[number % len(vectors)], monitors[number % len(vectors)]
        for watched in (None, monitor):
            what = "steer" if watched is None else "monitor"
            tried(f"{what} {one.sites[0]} {scope} {mode}", lambda a=(model, one, scope, mode, watched): steered(*a))
    for place, one in enumerate(vectors):
        for scope in SCOPES:
            at = tried(f"{one.sites[0]} at {scope}", lambda one=one, scope=scope: one.at(scope=scope))
            if at is not None:
                for mode in ways[place % 3 :: 3] if scope == "all" else ways[:1]:
                    tried(f"edited {one.sites[0]} {scope} {mode}", lambda a=(model, at, mode): edited(*a))
                tried(f"bake {one.sites[0]} {scope}", lambda a=(model, at): bake(*a))
    return tried


def told(families: list[str]) -> Iterator[tuple[str, Tried]]:
    """Every family with what came of it; at the end the sum, printed."""
    total: collections.Counter[str] = collections.Counter()
    for family in families:
        tried = exhaust(family)
        total += tried.outcomes
        yield family, tried
    sys.stdout.write(f"{len(families)} families: {dict(total)}\n")


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER])
def test_no_error_is_foreign(family: str) -> None:
    tried = exhaust(family)
    assert tried.outcomes["done"] > 100
    assert tried.foreign == []


if __name__ == "__main__":
    for name, one in told(sys.argv[1:] or [*FAMILIES, *FURTHER]):
        sys.stdout.write("\n  ".join([f"{name}: {dict(one.outcomes)}", *one.foreign[:8], ""]) + "\n")
        sys.stdout.flush()
