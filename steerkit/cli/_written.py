"""What is wrong with how an option is written, told before anything is read or a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from steerkit.cli._shared import readout_of

__all__ = ["check_written"]


def check_written(**values: str | Path | None) -> None:
    """Read options that only a loaded model could use, for their form.

    Args:
        values: by what they are (see `_READ`); None was not given.

    Raises:
        SteerError: one is not written as such, or a folder is not there.
    """
    for what, value in values.items():
        if value is not None:
            _READ[what](str(value))


def _layers(text: str) -> None:
    from steerkit.network.sites import parse_layers

    parse_layers(text, None)


def _layer_sets(text: str) -> None:
    from steerkit.evaluate.layer_sets import parse_candidates

    parse_candidates(text, None)


def _readout(text: str) -> None:
    from steerkit.activations.readout import Readout

    reading = readout_of(text)
    Readout.parse(text if reading is None else reading)  # 0 is the first token


def _scope(text: str) -> None:
    from steerkit.tokens.scope import Scope

    Scope.parse(text)


def _site(text: str) -> None:
    from steerkit.network.sites import Site

    Site.of(text)


def _kinds(text: str) -> None:
    from steerkit.network.sites import Site

    for kind in text.split(","):
        Site(0, kind.strip())


def _method(text: str) -> None:
    from steerkit.methods._registry import resolve

    resolve(text)


def _slopes(text: str) -> None:
    from steerkit.evaluate.attribution.slopes import differentiable

    differentiable(text)


def _tasks(text: str) -> None:
    from steerkit.evaluate.lm_eval_library import check_folder

    check_folder(text)


_READ: dict[str, Callable[[str], None]] = {
    "layers": _layers,
    "layer_sets": _layer_sets,
    "readout": _readout,
    "scope": _scope,
    "site": _site,
    "kinds": _kinds,
    "method": _method,
    "slopes_of": _slopes,
    "tasks_in": _tasks,
}
