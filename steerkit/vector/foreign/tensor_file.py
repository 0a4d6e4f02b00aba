"""Tensors in a safetensors file that is no vector of steerkit's: one direction, or one for each layer by its name."""

from __future__ import annotations

import safetensors.torch
from safetensors import SafetensorError

from steerkit.errors import VectorFileError
from steerkit.vector.foreign.directions import Directions, by_name
from steerkit.vector.foreign.kinds import Kind

__all__ = ["read_tensors"]


def read_tensors(data: bytes, tensor: str | None) -> Directions:
    """Read the tensors of a file.

    Args:
        data: the file.
        tensor: the name of the one that is meant; None takes what there is.

    Raises:
        VectorFileError: the file is damaged, or there is no such tensor.
    """
    try:
        found = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise VectorFileError(f"damaged safetensors file ({str(error)[:200]}); get it anew") from None
    return by_name(Kind.SAFETENSORS, found, tensor)
