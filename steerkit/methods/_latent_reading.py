"""Reading latents while the model runs: some rows of a dictionary, or all of them where one cannot be known alone."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from steerkit.dictionary.activation import fired
from steerkit.dictionary.dictionary import Dictionary, LatentRows
from steerkit.dictionary.reading import load_dictionary
from steerkit.errors import VectorFileError, VectorMismatchError
from steerkit.maths.directions import coordinates

__all__ = ["ROWS", "digest_of", "latents_of", "placed_rows", "placed_whole", "rows_tensors"]

ROWS = ("encoder", "bias", "threshold", "gate_bias", "gate_scale")


class _Placed(dict[str, Tensor]):
    """All rows of a dictionary for one dtype and device."""


_PLACED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the digest tensor of a vector in use, what is placed for it, so that no pass asks the disk or copies anything."""
_SHARED: WeakValueDictionary[tuple[str, torch.dtype, torch.device], _Placed] = WeakValueDictionary()
"""By digest, what is placed for any vector in use."""


def rows_tensors(rows: LatentRows) -> dict[str, Tensor]:
    """What reads latents, by name: those of `ROWS` that there are, [k, d] and [k].

    Args:
        rows: of a dictionary.
    """
    named = {name: getattr(rows, name) for name in ROWS}
    return {name: value for name, value in named.items() if value is not None}


def placed_rows(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, prefix: str = ""
) -> dict[str, Tensor]:
    """The same where they are needed, the encoder turned to [d, k].

    Args:
        tensors: those of `ROWS` that there are.
        dtype: float32 at least.
        device: of the activations.
        prefix: put before each name.
    """
    found = {name: tensors[name].to(device, dtype) for name in ROWS if name in tensors}
    found["encoder"] = found["encoder"].T.contiguous()
    return {prefix + name: value for name, value in found.items()}


def latents_of(h: Tensor, rows: Mapping[str, Tensor], prefix: str = "", top_k: int | None = None) -> Tensor:
    """The latents of activations.

    Args:
        h: [b, t, d], of the rows' dtype.
        rows: what `placed_rows` gave.
        prefix: before each name.
        top_k: how many fire, where that decides.

    Returns:
        [b, t, k]
    """
    return fired(
        coordinates(h, rows[f"{prefix}encoder"]),
        rows[f"{prefix}bias"],
        threshold=rows[f"{prefix}threshold"],
        gate_bias=rows.get(f"{prefix}gate_bias"),
        gate_scale=rows.get(f"{prefix}gate_scale"),
        top_k=top_k,
    )


def digest_of(dictionary: Dictionary) -> Tensor:
    """A dictionary's digest as a vector file holds it, int64 [32].

    Args:
        dictionary: any.
    """
    return torch.tensor(list(bytes.fromhex(dictionary.digest)), dtype=torch.int64)


def placed_whole(
    path: str, site: str, digest: Tensor, dtype: torch.dtype, device: torch.device
) -> Mapping[str, Tensor]:
    """All rows of the dictionary that a vector refers to, where they are needed; read and placed once for a vector.

    Args:
        path: where the dictionary was when the vector was fitted.
        site: where it belongs, where its files do not say; else empty.
        digest: [32] of what it was then, the vector's own tensor.
        dtype: float32 at least.
        device: of the activations.

    Returns:
        What `placed_rows` gives, ``all_`` before each name, and ``top_k`` [k, 0]: how many latents fire, 0 where
        something else decides. It is a shape because it is one of what is computed.

    Raises:
        VectorMismatchError: the dictionary is not there, or is another one.
    """
    if digest not in _PLACED:
        _PLACED[digest] = {}
    kept: dict[tuple[torch.dtype, torch.device], _Placed] = _PLACED[digest]
    if (dtype, device) not in kept:
        name = bytes(digest.tolist()).hex()
        kept[dtype, device] = _SHARED.get((name, dtype, device)) or _placed(_whole(path, site, name), dtype, device)
        _SHARED[name, dtype, device] = kept[dtype, device]
    return kept[dtype, device]


def _placed(one: Dictionary, dtype: torch.dtype, device: torch.device) -> _Placed:
    rows = placed_rows(rows_tensors(one.rows(range(one.num_latents))), dtype, device, "all_")
    top_k = one.top_k if one.needs_all and one.top_k else 0
    return _Placed(rows, top_k=torch.empty(top_k, 0, dtype=dtype, device=device))


def _whole(path: str, site: str, digest: str) -> Dictionary:
    """The dictionary at a path.

    Raises:
        VectorMismatchError: it is not there, or is another one.
    """
    remedy = "this vector reads all of its latents; put it there, or fit the vector again"
    try:
        found = load_dictionary(path, site=site or None)
    except VectorFileError as error:
        raise VectorMismatchError(f"the dictionary {path!r} cannot be read ({error}); {remedy}") from None
    if found.digest != digest:
        raise VectorMismatchError(f"the dictionary {path!r} is another one than the vector was fitted with; {remedy}")
    return found
