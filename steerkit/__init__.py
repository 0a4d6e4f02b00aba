"""steerkit: steer Hugging Face language models from inside.

One road: prompts -> activations -> fitted method -> vector file -> steer -> generate, evaluate, bake.

Importing this package loads neither torch nor transformers; a name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerkit import methods
    from steerkit.activations import Activations, record
    from steerkit.data import ContrastSet, Conversation
    from steerkit.drift import finetuning_shift, projection_difference
    from steerkit.errors import (
        DataError,
        FitError,
        ModelError,
        RecipeError,
        ScopeError,
        SiteError,
        SteerError,
        StrengthError,
        UnknownNameError,
        VectorFileError,
        VectorMismatchError,
    )
    from steerkit.evaluate.scorers._base import Scorer
    from steerkit.evaluate.scoring import measure
    from steerkit.evaluate.trial import Setup
    from steerkit.explaining import explain
    from steerkit.finetuning import SteeringCallback
    from steerkit.fitting import fit
    from steerkit.generation import generate
    from steerkit.models import load_model
    from steerkit.monitoring import Monitor
    from steerkit.sites import Site
    from steerkit.steering import Steering, steer
    from steerkit.traits import TraitSpec
    from steerkit.vector import SteeringVector
    from steerkit.weights import edited

__version__ = "0.1.0"

_HOMES = {
    "Activations": "activations",
    "ContrastSet": "data",
    "Conversation": "data",
    "DataError": "errors",
    "FitError": "errors",
    "ModelError": "errors",
    "Monitor": "monitoring",
    "RecipeError": "errors",
    "ScopeError": "errors",
    "Scorer": "evaluate.scorers._base",
    "Setup": "evaluate.trial",
    "Site": "sites",
    "SiteError": "errors",
    "SteerError": "errors",
    "Steering": "steering",
    "SteeringCallback": "finetuning",
    "SteeringVector": "vector",
    "StrengthError": "errors",
    "TraitSpec": "traits",
    "UnknownNameError": "errors",
    "VectorFileError": "errors",
    "VectorMismatchError": "errors",
    "edited": "weights",
    "explain": "explaining",
    "finetuning_shift": "drift",
    "fit": "fitting",
    "generate": "generation",
    "load_model": "models",
    "measure": "evaluate.scoring",
    "projection_difference": "drift",
    "record": "activations",
    "steer": "steering",
}

__all__ = [
    "Activations",
    "ContrastSet",
    "Conversation",
    "DataError",
    "FitError",
    "ModelError",
    "Monitor",
    "RecipeError",
    "ScopeError",
    "Scorer",
    "Setup",
    "Site",
    "SiteError",
    "SteerError",
    "Steering",
    "SteeringCallback",
    "SteeringVector",
    "StrengthError",
    "TraitSpec",
    "UnknownNameError",
    "VectorFileError",
    "VectorMismatchError",
    "edited",
    "explain",
    "finetuning_shift",
    "fit",
    "generate",
    "load_model",
    "measure",
    "methods",
    "projection_difference",
    "record",
    "steer",
]


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module("steerkit.methods")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"steerkit.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'steerkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
