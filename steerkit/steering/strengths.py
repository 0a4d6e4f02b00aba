"""What callers give for vectors and strengths, checked and brought to one form."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steerkit.composition.rows import vectors_by_row
from steerkit.composition.terms import Composition
from steerkit.errors import StrengthError, VectorFileError
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Strength", "Vectors", "strength_value", "vectors_of", "warn_beyond"]

Strength = float | Sequence[float] | Tensor
Row = Composition | str | Sequence[SteeringVector] | None
Vectors = SteeringVector | Composition | str | Sequence[SteeringVector] | Sequence[Row]
_LARGEST = torch.finfo(torch.float32).max


def vectors_of(vectors: Any) -> list[SteeringVector]:
    """One vector or several as a list.

    Args:
        vectors: what the caller gave: a vector, a list of them, a composition or its text, or for each row of the batch
            a composition, its text, a list of vectors, or None.

    Raises:
        VectorFileError: something else than vectors, or none.
        SteerError: a composition that is none, or whose vectors cannot be had.
    """
    if isinstance(vectors, str | Composition):
        return Composition.parse(vectors).vectors()
    listed = list(vectors) if isinstance(vectors, list | tuple) else [vectors]
    if any(one is None or isinstance(one, str | Composition | list | tuple) for one in listed) and listed != [None]:
        return vectors_by_row(listed)
    for one in listed:
        if not isinstance(one, SteeringVector):
            raise VectorFileError(f"got {one!r} for a vector; load a file with SteeringVector.load(path)")
    if not listed:
        raise VectorFileError("got an empty list of vectors; give at least one")
    return listed


def strength_value(value: Strength) -> float | tuple[float, ...]:
    """A finite number, or a tuple of them, one per row.

    Args:
        value: what the caller gave.

    Raises:
        StrengthError: not a number, not finite, or no row.
    """
    listed: Any = value.tolist() if hasattr(value, "tolist") else value  # tensors and numpy's numbers
    rows = list(listed) if isinstance(listed, Sequence) and not isinstance(listed, str) else [listed]
    for row in rows:
        if isinstance(row, bool) or not isinstance(row, int | float) or not abs(row) <= _LARGEST:
            raise StrengthError(f"strength: got {row!r}; give a finite number, or one per row of the batch")
    if not rows:
        raise StrengthError("strength: got an empty list; give a finite number, or one per row of the batch")
    return tuple(map(float, rows)) if isinstance(listed, Sequence) else float(rows[0])


def warn_beyond(vector: SteeringVector, value: float | tuple[float, ...], unit: str) -> None:
    """Warn of a strength beyond the one that the vector's file knows to cost more than the budget.

    Args:
        vector: the vector; `calibration` holds the limit, in the unit of the suggested strength.
        value: the strength, one number or one per row.
        unit: what it counts in; strengths in the other unit are not compared.

    Warns:
        UserWarning: see above.
    """
    limit = vector.calibration.get("limit")
    if not isinstance(limit, int | float) or unit != vector.unit or vector.suggested_strength is None:
        return
    largest = max(map(abs, value if isinstance(value, tuple) else (value,)))
    if largest > abs(limit):
        warnings.warn(  # Python shows it once, unless it is told to show more
            f"strength {largest:g} is beyond {limit:g}, from where on this vector is known to cost too much "
            f"(suggested is {vector.suggested_strength:g}); texts may loop",
            stacklevel=4,
        )
