"""Parameters and buffers of a model, wherever they are: in memory, or offloaded by accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import ModelError

__all__ = ["stored", "stored_dtype"]


def stored(model: nn.Module, name: str) -> Tensor | None:
    """Give a parameter or buffer, read in where accelerate has offloaded it to CPU memory or the disk.

    Args:
        model: the transformers model.
        name: of a parameter or buffer; a bias may be absent.

    Returns:
        [...] as the model has it, or None where it is absent.

    Raises:
        ModelError: it has no values anywhere.
    """
    path, _, leaf = name.rpartition(".")
    tensor: Tensor | None = getattr(model.get_submodule(path), leaf, None)
    if tensor is None or not tensor.is_meta:
        return None if tensor is None else tensor.detach()
    parts = path.split(".") if path else []
    for end in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        rest = ".".join([*parts[end:], leaf])
        for values in _offloaded(module):
            with contextlib.suppress(KeyError):  # to ask first would read it from the disk twice
                return values[rest].detach()
    raise ModelError(f"{name} is on the meta device and offloaded nowhere; load the model with from_pretrained")


def stored_dtype(model: nn.Module, name: str) -> torch.dtype:
    """The precision of a parameter or buffer, without reading it; of an absent bias, that of its layer's weight.

    Args:
        model: the transformers model.
        name: as for `stored`.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, leaf, None)
    found = module.weight if tensor is None else tensor
    assert isinstance(found, Tensor)
    return found.dtype


def _offloaded(module: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """The weights that accelerate keeps for a module."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        values = getattr(one, "weights_map", None)
        if values is not None:
            yield values
