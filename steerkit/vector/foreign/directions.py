"""`Directions`: what a file of another program holds, before a model says where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import VectorFileError
from steerkit.vector.foreign.kinds import Kind

__all__ = ["Directions", "as_direction"]


@dataclass(frozen=True)
class Directions:
    """Directions read from another program's file.

    Attributes:
        kind: what the file is.
        by_layer: block counted from 0 to [d] float32, the direction that is added to the block's output.
        loose: tensors [d] or [n, d] float32 by name, of which the file does not say where they belong.
        model_type: family of the model, as the file says it; None where it does not.
        scope: which tokens the other program adds to; None where the file is of no program.
    """

    kind: Kind
    by_layer: Mapping[int, Tensor]
    loose: Mapping[str, Tensor]
    model_type: str | None = None
    scope: str | None = None


def as_direction(name: str, value: Any) -> Tensor:
    """Numbers as float32.

    Args:
        name: what to call them in messages.
        value: an array or nested lists, of any shape.

    Raises:
        VectorFileError: they are no numbers, or there are none, or not all are finite.
    """
    try:
        found = torch.as_tensor(value, dtype=torch.float32).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise VectorFileError(f"{name}: holds no numbers ({error})") from None
    if not found.numel() or not bool(torch.isfinite(found).all()):
        raise VectorFileError(f"{name}: holds no numbers, or some that are not finite")
    return found
