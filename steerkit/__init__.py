"""steerkit: steer Hugging Face language models from inside.

One road: prompts -> activations -> fitted method -> vector file -> steer -> generate, evaluate, bake.

Importing this package loads neither torch nor transformers; a name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerkit import methods, tuning
    from steerkit._support.processes import split_between_processes
    from steerkit._support.shipped import shipped_vectors
    from steerkit.activations.recording import Activations, record
    from steerkit.composition.terms import Composition
    from steerkit.errors import (
        CompositionError,
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
    from steerkit.evaluate.setup import Setup
    from steerkit.evaluate.suggesting import suggest_strength
    from steerkit.fitting.discovering import discover
    from steerkit.fitting.fitting import fit
    from steerkit.generation import generate
    from steerkit.model import load_model
    from steerkit.monitor.decisions import explain
    from steerkit.monitor.difference import projection_difference
    from steerkit.monitor.monitor import Monitor
    from steerkit.monitor.operating import operating_points
    from steerkit.monitor.shift import finetuning_shift
    from steerkit.network.sites import Site
    from steerkit.persona.traits import TraitSpec
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.prompts.conversation import Conversation
    from steerkit.steering.callback import SteeringCallback
    from steerkit.steering.readings import with_neutral
    from steerkit.steering.steering import Steering, steer
    from steerkit.steering.weights import edited
    from steerkit.vector.steering_vector import SteeringVector

__version__ = "0.1.0"

_HOMES = {
    "Activations": "activations",
    "Composition": "composition",
    "CompositionError": "errors",
    "ContrastSet": "prompts",
    "Conversation": "prompts",
    "DataError": "errors",
    "FitError": "errors",
    "ModelError": "errors",
    "Monitor": "monitor",
    "RecipeError": "errors",
    "ScopeError": "errors",
    "Scorer": "evaluate.scorers._base",
    "Setup": "evaluate",
    "Site": "network",
    "SiteError": "errors",
    "SteerError": "errors",
    "Steering": "steering",
    "SteeringCallback": "steering.callback",
    "SteeringVector": "vector",
    "StrengthError": "errors",
    "TraitSpec": "persona.traits",
    "UnknownNameError": "errors",
    "VectorFileError": "errors",
    "VectorMismatchError": "errors",
    "discover": "fitting.discovering",
    "edited": "steering",
    "explain": "monitor",
    "finetuning_shift": "monitor",
    "fit": "fitting",
    "generate": "generation",
    "load_model": "model",
    "measure": "evaluate",
    "operating_points": "monitor",
    "projection_difference": "monitor",
    "record": "activations",
    "shipped_vectors": "_support.shipped",
    "split_between_processes": "_support.processes",
    "steer": "steering",
    "suggest_strength": "evaluate.suggesting",
    "with_neutral": "steering",
}

__all__ = [
    "Activations",
    "Composition",
    "CompositionError",
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
    "discover",
    "edited",
    "explain",
    "finetuning_shift",
    "fit",
    "generate",
    "load_model",
    "measure",
    "methods",
    "operating_points",
    "projection_difference",
    "record",
    "shipped_vectors",
    "split_between_processes",
    "steer",
    "suggest_strength",
    "tuning",
    "with_neutral",
]


def __getattr__(name: str) -> Any:
    if name in ("methods", "tuning"):
        return importlib.import_module(f"steerkit.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"steerkit.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'steerkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
