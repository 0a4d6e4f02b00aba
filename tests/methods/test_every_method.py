"""Every method there is passes the conformance checks; a method cannot be added untested."""

from __future__ import annotations

import functools
import importlib
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from steerkit.checks.contract import CHECKS, conformance
from steerkit.maths.edits import add
from steerkit.methods import _registry as registry
from steerkit.methods._addition import AddDirection
from steerkit.methods._base import Method, has_sides
from steerkit.prompts.contrast_set import ContrastSet
from tests.families import build
from tests.plugged import register
from tests.ready import ready
from tests.tiny_tokenizers import CHATML, byte_tokenizer

PAIRS = [
    ("a bright and cheerful morning", "a dull and gloomy morning"),
    ("what a happy little town", "what a weary little town"),
    ("they danced with joy all day", "they wept in grief all day"),
    ("sunny and warm by the sea", "bitter and cold by the sea"),
]


def data_for(method: Method) -> ContrastSet | list[str]:
    if not has_sides(method):
        return [PAIRS[0][0]]
    if method.readout == "response_mean":
        return ContrastSet.from_answers([("What was it like?", f" {good}.", f" {bad}.") for good, bad in PAIRS])
    pairs = PAIRS[:1] if method.readout is None else PAIRS
    short = method.readout is None
    return ContrastSet.from_prompts(
        [("joy" if short else good) for good, _ in pairs],
        [("woe is" if short else bad) for _, bad in pairs],
        raw=True,
    )


def families_of(name: str) -> tuple[str, ...]:
    """Two families that a method can be fitted on; experts are routed in few."""
    return ("mixtral", "qwen3_moe") if name == "experts" else ("llama", "gpt2")


@functools.cache
def findings(name: str, family: str) -> dict[str, Any]:
    method = ready(name)
    found = conformance(method, build(family), byte_tokenizer(CHATML), data_for(method), strength=3.0)
    return {finding.check: finding for finding in found}


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name in registry.method_names() for family in families_of(name)]
)
def test_conformance(name: str, check: str, family: str) -> None:
    finding = findings(name, family)[check]
    assert finding.passed, finding.reason


@dataclass(frozen=True)
class InPlace(AddDirection):
    """What the checks are for: it changes its input and ignores where a row starts."""

    name = "in_place"
    title = paper = "broken on purpose"

    def fit_site(self, positive: torch.Tensor, negative: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"direction": negative.mean(0) - positive.mean(0)}  # the wrong way round

    def edit(self, h: torch.Tensor, prepared: Any, tokens: Any) -> torch.Tensor:
        h += 0.1
        return add(h, prepared["direction"])


def test_a_broken_method_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, InPlace)
    method = InPlace()
    found = conformance(method, build("llama"), byte_tokenizer(CHATML), data_for(method), strength=3.0)
    failed = {finding.check for finding in found if not finding.passed}
    assert {"keeps_shape_and_dtype_and_input", "positive_side_lies_further_along"} <= failed


@pytest.mark.parametrize("name", registry.method_names())
def test_every_method_says_what_it_is(name: str) -> None:
    method = registry.resolve(name)
    assert method.name == name
    assert method.title
    assert method.paper
    assert method().default_scope.partition("(")[0] in method.scopes
    module = importlib.import_module(method.__module__)
    assert re.search("arXiv|https://", module.__doc__ or "")


def test_no_method_imports_another() -> None:
    import ast
    from pathlib import Path

    folder = Path(registry.__file__).parent
    for path in folder.glob("[!_]*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            for name in node.names:  # the door itself, and what several methods have in common, are free to all
                room, _, inner = f"{node.module}.{name.name}".partition("steerkit.methods.")
                assert room or inner.split(".")[0] not in registry.method_names(), f"{path.name} imports {inner}"
