"""One file, one published method; no method imports another. `steerkit.methods.caa` is the file `caa.py`.

To write one, derive from `Method`, `AddDirection` or `MeanDifference` in a file of this folder, or in a package of your
own with an entry point of the group `steerkit.methods`. `Subject` is what `fit` may ask of the model, `Schedule` how it
trains parameters; `Params` and `Prepared` are a method's tensors as stored and as applied; `CONTRAST`, `PAIRS`,
`ONE_PAIR`, `TWO_KINDS` and `PROMPTS` are what it may be fitted on. Files with an underscore are what several methods
share.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerkit.methods._addition import AddDirection, MeanDifference
    from steerkit.methods._base import CONTRAST, ONE_PAIR, PAIRS, PROMPTS, TWO_KINDS, FittedOn, Method
    from steerkit.methods._protocols import Editor, HeatMap, Params, PartsTable, Prepared, WeightUpdate
    from steerkit.methods._subject import Schedule, Subject

_HOMES = {
    "CONTRAST": "_base",
    "ONE_PAIR": "_base",
    "PAIRS": "_base",
    "PROMPTS": "_base",
    "TWO_KINDS": "_base",
    "AddDirection": "_addition",
    "Editor": "_protocols",
    "FittedOn": "_base",
    "HeatMap": "_protocols",
    "MeanDifference": "_addition",
    "Method": "_base",
    "Params": "_protocols",
    "PartsTable": "_protocols",
    "Prepared": "_protocols",
    "Schedule": "_subject",
    "Subject": "_subject",
    "WeightUpdate": "_protocols",
}

__all__ = [
    "CONTRAST",
    "ONE_PAIR",
    "PAIRS",
    "PROMPTS",
    "TWO_KINDS",
    "AddDirection",
    "Editor",
    "FittedOn",
    "HeatMap",
    "MeanDifference",
    "Method",
    "Params",
    "PartsTable",
    "Prepared",
    "Schedule",
    "Subject",
    "WeightUpdate",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"steerkit.methods.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'steerkit.methods' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
