"""`Directions`: what a file of another program holds, before a model says where it belongs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from steerkit.errors import VectorFileError
from steerkit.vector.foreign.kinds import Kind

__all__ = ["Directions", "as_direction", "by_name", "layer_number"]

_MOST_DIGITS = 6


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
    name = name[:80]
    if isinstance(value, Tensor) and (value.is_complex() or value.dtype == torch.bool):
        raise VectorFileError(f"{name}: holds {value.dtype}; a direction consists of real numbers")
    if isinstance(value, numpy.ndarray):
        with numpy.errstate(all="ignore"):  # what is no finite number is seen right after
            value = value.astype(numpy.float64)
    try:
        found = torch.as_tensor(value, dtype=torch.float32).clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise VectorFileError(f"{name}: holds no numbers ({str(error)[:200]})") from None
    if not found.numel() or not bool(torch.isfinite(found).all()):
        raise VectorFileError(f"{name}: holds no numbers, or some that are not finite")
    return found


def layer_number(text: str) -> int | None:
    """The number of a block as a file writes it; None where it is none that a model could have.

    Args:
        text: digits.
    """
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else None


def by_name(kind: Kind, found: Mapping[str, Any], tensor: str | None = None) -> Directions:
    """Tensors by name; those whose names hold one number each, all different, belong to these layers.

    Args:
        kind: of the file that they are from.
        found: name to an array or a tensor, of any shape.
        tensor: the name of the one that is meant; None takes what there is.

    Raises:
        VectorFileError: there is no such tensor, or one holds no numbers.
    """
    if tensor is not None:
        if tensor not in found:
            raise VectorFileError(f"no tensor {tensor!r}; there are {', '.join(sorted(found)[:12]) or 'none'}")
        return Directions(kind, {}, {tensor: as_direction(tensor, found[tensor])})
    kept = {name: as_direction(name, value) for name, value in sorted(found.items())}
    numbers = {name: re.findall(r"[0-9]+", name) for name in kept}
    layers = {name: layer_number(given[0]) for name, given in numbers.items() if len(given) == 1}
    placed = {layer: kept[name].reshape(-1) for name, layer in layers.items() if layer is not None}
    if len(found) > 1 and len(placed) == len(found) and all(value.squeeze().dim() == 1 for value in kept.values()):
        return Directions(kind, dict(sorted(placed.items())), {})
    return Directions(kind, {}, kept)
