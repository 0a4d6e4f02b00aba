"""The errors steerkit raises, all under one base class.

    SteerError
    ├── DataError            prompts, pairs or files of prompts that cannot be used
    ├── ModelError           a model that cannot be loaded or steered in its present state
    ├── SiteError            a place in the network that does not exist or is not what was asked
    ├── CompositionError     a text or a file that is no composition of vectors
    ├── ScopeError           which tokens are meant cannot be known in this pass
    ├── StrengthError        a strength that is not a finite number, or of the wrong shape
    ├── FitError             a method cannot be fitted on these activations
    ├── VectorFileError      a vector file that cannot be read or written
    ├── VectorMismatchError  a vector that does not belong to this model
    ├── RecipeError          a recipe with a mistake in it
    └── UnknownNameError     a method, recipe, vector or model name that nothing answers to

Every message is one line: what was asked, the value got, what is allowed, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "CompositionError",
    "DataError",
    "FitError",
    "ModelError",
    "RecipeError",
    "ScopeError",
    "SiteError",
    "SteerError",
    "StrengthError",
    "UnknownNameError",
    "VectorFileError",
    "VectorMismatchError",
    "near_miss",
    "unknown_name",
]


class SteerError(Exception):
    """Base of every error that steerkit raises on purpose."""


class DataError(SteerError):
    """Prompts, pairs or a file of prompts that cannot be used."""


class ModelError(SteerError):
    """A model that cannot be loaded, or cannot be steered in its present state."""


class SiteError(SteerError):
    """A place in the network that does not exist, or is not what was asked."""


class CompositionError(SteerError):
    """A text, plain data or a file that is no composition of vectors."""


class ScopeError(SteerError):
    """Which tokens are meant cannot be known in this pass."""


class StrengthError(SteerError):
    """A strength that is not a finite number, or has the wrong number of rows."""


class FitError(SteerError):
    """A method cannot be fitted on these activations.

    Attributes:
        candidates: what a method that selects looked at, with its scores, where it found none good enough.
    """

    def __init__(self, message: str = "", *, candidates: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.candidates = tuple(candidates)


class VectorFileError(SteerError):
    """A vector file that cannot be read or written."""


class VectorMismatchError(SteerError):
    """A vector that does not belong to this model."""


class RecipeError(SteerError):
    """A recipe with a mistake in it."""


class UnknownNameError(SteerError):
    """A name that nothing answers to."""


def near_miss(name: str, allowed: Iterable[str]) -> str:
    """Say which allowed names are close to `name`, or list them all.

    Args:
        name: what was asked for.
        allowed: the names that exist.

    Returns:
        Half a sentence to end an error message with.
    """
    choices = sorted(allowed)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(match) for match in close)}?"
    if not choices:
        return "there are none"
    return f"there are: {', '.join(choices)}"


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> UnknownNameError:
    """Build the error for a name that nothing answers to, with near misses.

    Args:
        kind: what the name should have been, such as ``"method"``.
        name: what was asked for.
        allowed: the names that exist.
    """
    return UnknownNameError(f"unknown {kind} {name!r}; {near_miss(name, allowed)}")
