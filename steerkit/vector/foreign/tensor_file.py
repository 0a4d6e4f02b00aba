"""Tensors in a safetensors file that is no vector of steerkit's: one direction, or one for each layer by its name."""

from __future__ import annotations

import re

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from steerkit.errors import VectorFileError
from steerkit.vector.foreign.directions import Directions, as_direction
from steerkit.vector.foreign.kinds import Kind

__all__ = ["read_tensors"]


def read_tensors(data: bytes, tensor: str | None) -> Directions:
    """Read the tensors of a file; those whose names hold one number each, all different, belong to these layers.

    Args:
        data: the file.
        tensor: the name of the one that is meant; None takes what there is.

    Raises:
        VectorFileError: the file is damaged, or there is no such tensor.
    """
    try:
        found = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise VectorFileError(f"damaged safetensors file ({error}); get it anew") from None
    if tensor is not None:
        if tensor not in found:
            raise VectorFileError(f"no tensor {tensor!r}; there are {', '.join(sorted(found)[:12]) or 'none'}")
        return Directions(Kind.SAFETENSORS, {}, {tensor: as_direction(tensor, found[tensor])})
    numbers = {name: re.findall(r"\d+", name) for name in found}
    layers = [int(given[0]) for given in numbers.values() if len(given) == 1]
    kept: dict[str, Tensor] = {name: as_direction(name, value) for name, value in sorted(found.items())}
    if len(found) > 1 and len(set(layers)) == len(found) and all(value.squeeze().dim() == 1 for value in kept.values()):
        by_layer = {int(numbers[name][0]): value.reshape(-1) for name, value in kept.items()}
        return Directions(Kind.SAFETENSORS, dict(sorted(by_layer.items())), {})
    return Directions(Kind.SAFETENSORS, {}, kept)
