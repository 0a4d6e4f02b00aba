"""Which weights a vector was fitted on: digests of the matrices that write at its sites, and the check of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from steerkit.errors import ModelError, VectorMismatchError
from steerkit.network.decoder import Decoder, find_decoder, inner_model
from steerkit.network.linears import bare_parameter, writers_at
from steerkit.network.sites import Site

__all__ = ["check_weights", "weight_digests"]


def weight_digests(model: nn.Module | Decoder, sites: Iterable[Site]) -> dict[str, str]:
    """What identifies the matrices of the linear layers and experts that write at some sites; see `check_weights`.

    Args:
        model: as for `find_decoder`, or its decoder.
        sites: the places written.

    Returns:
        Name of the weight to the sha256 of its values, rounded to bfloat16 where they are floating-point numbers (so
        that a checkpoint loaded in float32 and in bfloat16 is the same), as they are stored where they are packed.

    Raises:
        SiteError: neither a linear layer nor routed experts write there.
        ModelError: a weight is offloaded.
    """
    found = {}
    decoder = model if isinstance(model, Decoder) else find_decoder(model)
    for writer in writers_at(decoder, sites).values():
        for name in writer.parameters:
            weight = bare_parameter(decoder.model, name)
            if not isinstance(weight, Tensor) or weight.is_meta:
                raise ModelError(f"{name} is offloaded or hidden, so it cannot be identified; load it whole")
            found[name] = _digest(weight)
    return found


def check_weights(model: nn.Module, digests: Mapping[str, str]) -> None:
    """Refuse a model whose weights are not those that `weight_digests` saw.

    Args:
        model: a transformers model, wrapped or not. Adapters around a layer are not part of its weight.
        digests: name of the weight to its digest.

    Raises:
        VectorMismatchError: the model lacks a weight, or holds another one.
    """
    inner = inner_model(model)
    for name, digest in digests.items():
        try:
            weight = bare_parameter(inner, name)
        except AttributeError:
            weight = None
        if not isinstance(weight, Tensor):
            raise VectorMismatchError(f"the vector edits {name}, which {type(inner).__name__} has not; fit one on it")
        if weight.is_meta:
            raise VectorMismatchError(f"{name} is offloaded, so whether the vector was fitted on it cannot be seen")
        if _digest(weight) != digest:
            raise VectorMismatchError(
                f"the vector was fitted on other weights: {name} differs (another checkpoint or precision, or edited "
                "already); fit one on this model, or load the other"
            )


# Weights are hashed once: by identity, and only as long as nothing says that they were written since.
_KNOWN: Any = WeakIdKeyDictionary()


def _digest(weight: Tensor) -> str:
    """The sha256 of a weight's values; of a tensor type that holds others (torchao, quanto) theirs."""
    if hasattr(weight, "__tensor_flatten__"):
        inner = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
        return hashlib.sha256(" ".join(map(_digest, inner)).encode()).hexdigest()
    values = weight.detach()
    flat = values.reshape(-1)
    # Writing through `.data` leaves the version as it was, hence the sample.
    sample = flat[:: max(1, flat.numel() // 256)].to("cpu", copy=True)
    version = -1 if weight.is_inference() else weight._version
    key = (version, weight.data_ptr(), weight.dtype)
    known = _KNOWN.get(weight)
    if known is not None and known[0] == key and torch.equal(known[1], sample):
        return str(known[2])
    stored = values.to(torch.bfloat16) if values.is_floating_point() else values
    stored = stored.cpu().contiguous().reshape(-1)
    found = hashlib.sha256(repr(tuple(weight.shape)).encode())
    found.update(stored.view(torch.uint8).numpy().data)
    _KNOWN[weight] = (key, sample, found.hexdigest())
    return found.hexdigest()
