"""Reading latents while the model runs: some rows of a dictionary, or all of them where one cannot be known alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from steerkit.dictionary.activation import fired
from steerkit.dictionary.dictionary import Dictionary, LatentRows
from steerkit.dictionary.reading import load_dictionary
from steerkit.errors import VectorFileError, VectorMismatchError
from steerkit.maths.directions import coordinates

__all__ = ["ROWS", "digest_of", "latents_of", "placed_rows", "rows_tensors", "whole_dictionary"]

ROWS = ("encoder", "bias", "threshold", "gate_bias", "gate_scale")


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


def whole_dictionary(path: str, site: str, digest: Tensor) -> Dictionary:
    """The dictionary that a vector refers to; it is read once for as long as its file stays the same.

    Args:
        path: where it was when the vector was fitted.
        site: where it belongs, where its files do not say; else empty.
        digest: [32] of what it was then.

    Raises:
        VectorMismatchError: it is not there, or is another one.
    """
    remedy = "this vector reads all of its latents; put it there, or fit the vector again"
    try:
        found = _loaded(path, site, _changed(path))
    except VectorFileError as error:
        raise VectorMismatchError(f"the dictionary {path!r} cannot be read ({error}); {remedy}") from None
    if not torch.equal(digest_of(found), digest):
        raise VectorMismatchError(f"the dictionary {path!r} is another one than the vector was fitted with; {remedy}")
    return found


def _changed(path: str) -> tuple[int, ...]:
    """When what lies at a path was written: the file, or the files of the folder."""
    place = Path(path)
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    return tuple(file.stat().st_mtime_ns for file in files if file.is_file())


@functools.lru_cache(maxsize=2)
def _loaded(path: str, site: str, _state: tuple[int, ...]) -> Dictionary:
    return load_dictionary(path, site=site or None)
