"""What callers give for vectors and strengths, checked and brought to one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import StrengthError, VectorFileError
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Strength", "strength_value", "vectors_of"]

Strength = float | Sequence[float] | Tensor
_LARGEST = torch.finfo(torch.float32).max


def vectors_of(vectors: Any) -> list[SteeringVector]:
    """One vector or several as a list.

    Args:
        vectors: what the caller gave.

    Raises:
        VectorFileError: something else than vectors, or none.
    """
    listed = list(vectors) if isinstance(vectors, list | tuple) else [vectors]
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
