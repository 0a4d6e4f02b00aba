"""The tensors of a vector: copied once and for all, and checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerkit.errors import VectorFileError
from steerkit.vector.container import DTYPE_NAMES, MAX_DIMENSIONS

__all__ = ["check_direction", "direction_length", "own_copy"]


def own_copy(name: str, tensor: Any) -> Tensor:
    """A copy of one tensor that nobody else holds.

    Args:
        name: what to call it in messages.
        tensor: [...] of any shape and known dtype.

    Returns:
        [...] the same numbers, detached, contiguous, on the CPU.

    Raises:
        VectorFileError: no tensor, an unknown dtype, no numbers, too many dimensions, or one is not finite.
    """
    if not isinstance(tensor, Tensor):
        raise VectorFileError(f"{name} is {type(tensor).__name__}, not a tensor")
    if tensor.dtype not in DTYPE_NAMES:
        raise VectorFileError(f"{name} has dtype {tensor.dtype}; allowed are floats, integers and bool")
    if tensor.numel() == 0 or tensor.dim() > MAX_DIMENSIONS:
        raise VectorFileError(f"{name} has shape {list(tensor.shape)}; it must hold numbers in 0 to 8 dimensions")
    with torch.inference_mode(mode=False):  # a tensor made in inference mode could not be trained through later
        copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(copy).all()):
        raise VectorFileError(f"{name} is not finite; fit again in float32 or bfloat16")
    return copy


def check_direction(name: str, direction: Tensor, width: int) -> None:
    """Refuse a direction that is not as wide as its site.

    Args:
        name: what to call it in messages.
        direction: [d] or [k, d].
        width: d of the site.

    Raises:
        VectorFileError: it has another shape.
    """
    if direction.dim() not in (1, 2) or direction.shape[-1] != width:
        raise VectorFileError(f"{name} has shape {list(direction.shape)}; it must be [{width}] or [k, {width}]")


def direction_length(direction: Tensor | None) -> float | None:
    """The norm of a direction; of several, the median of those that are not zero.

    Args:
        direction: [d] or [k, d]; None has no norm.
    """
    if direction is None:
        return None
    norms = torch.linalg.vector_norm(direction.float(), dim=-1).reshape(-1)
    norms = norms[norms > 0]
    return float(norms.median()) if len(norms) else 0.0
