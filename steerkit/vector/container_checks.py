"""Checking the bytes of a vector file before anything in them is used."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from steerkit import __version__
from steerkit.errors import VectorFileError
from steerkit.vector.container import (
    BLANK_DIGEST,
    FORMAT,
    ITEM_BYTES,
    LAYER_COUNTING,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    REQUIRED,
    digest_entry,
)
from steerkit.vector.foreign.kinds import Kind, kind_of

__all__ = ["check_digest", "check_readable", "metadata_of"]


def check_digest(data: bytes, stored: str) -> None:
    """Refuse a file of which any byte is not as it was when the digest was written.

    Args:
        data: the file.
        stored: the digest in it.

    Raises:
        VectorFileError: they do not fit.
    """
    unsigned = data.replace(digest_entry(stored), digest_entry(BLANK_DIGEST), 1)
    if hashlib.sha256(unsigned).hexdigest() != stored:
        raise VectorFileError("altered file: its content does not match its digest; get it anew or fit again")


def metadata_of(data: bytes) -> dict[str, str]:
    """Check the container and read its metadata.

    Args:
        data: the file.

    Returns:
        The metadata, name to text.

    Raises:
        VectorFileError: not a safetensors file, or its parts do not fill it exactly.
    """
    header = _header(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise VectorFileError("its metadata is not text")
    if len(header) > MAX_TENSORS:
        raise VectorFileError(f"{len(header)} tensors are too many (at most {MAX_TENSORS})")
    spans = sorted(_span(name, entry) for name, entry in header.items())
    end = 0
    for begin, stop in spans:
        if begin != end:
            raise VectorFileError(f"damaged: tensor data should begin at byte {end}, the header says {begin}")
        end = stop
    present = len(data) - 8 - int.from_bytes(data[:8], "little")
    if end != present:
        what = "truncated" if present < end else "damaged"
        raise VectorFileError(f"{what}: {present} bytes of tensor data where {end} are expected; get it anew")
    return metadata


def _header(data: bytes) -> dict[str, Any]:
    """The JSON header of a safetensors file.

    Raises:
        VectorFileError: there is none.
    """
    if not data:
        raise VectorFileError("empty file; give a .safetensors file that steerkit saved")
    kind = kind_of(data)
    if kind is Kind.PICKLE:
        raise VectorFileError(f"looks like {kind.value}; pickles are never read, they can run code")
    if kind is Kind.TORCH:
        raise VectorFileError(
            f"{kind.value}, a pickle in a zip; pickles are never read here, `steerkit import FILE --out v.safetensors` "
            "makes a vector of its tensors alone"
        )
    if kind not in (None, Kind.SAFETENSORS):
        way = "; `steerkit import FILE --out v.safetensors` makes a vector of it" if kind.can_be_imported else ""
        raise VectorFileError(f"{kind.value}, no vector file of steerkit's{way}")
    size = int.from_bytes(data[:8], "little")
    if len(data) < 10 or size > len(data) - 8:
        raise VectorFileError(f"truncated, or no safetensors file: {len(data)} bytes, a header of {size} announced")
    if size > MAX_HEADER_BYTES:
        raise VectorFileError(f"its header of {size} bytes is too long (at most {MAX_HEADER_BYTES})")
    try:
        header = json.loads(data[8 : 8 + size].decode())
    except (ValueError, RecursionError):
        raise VectorFileError("damaged, or no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise VectorFileError("damaged, or no safetensors file: its header is no JSON object")
    return header


def _span(name: str, entry: Any) -> tuple[int, int]:
    """First byte of a tensor's data and the one after its last.

    Raises:
        VectorFileError: the header's entry for it contradicts itself.
    """
    known = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
    size = ITEM_BYTES.get(entry["dtype"]) if known and isinstance(entry["dtype"], str) else None
    shape = _whole_numbers(entry["shape"]) if known else None
    span = _whole_numbers(entry["data_offsets"]) if known else None
    if size is None or shape is None or span is None or len(span) != 2 or len(shape) > MAX_DIMENSIONS:
        raise VectorFileError(f"damaged: the header's entry for tensor {name[:80]!r} cannot be read")
    if math.prod(shape) * size != span[1] - span[0]:
        raise VectorFileError(f"damaged: tensor {name[:80]!r} has a shape that does not fit its bytes")
    return span[0], span[1]


def _whole_numbers(values: Any) -> list[int] | None:
    """The list, if it holds whole numbers from 0 that a file can have."""
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**48 for value in values):
        return None
    return values


def check_readable(metadata: Mapping[str, str]) -> None:
    """Refuse the files of other programs, of newer formats, or without what a vector needs.

    Args:
        metadata: of the file.

    Raises:
        VectorFileError: it is such a file.
    """
    missing = [name for name in ("format", *REQUIRED, "layer_counting", "digest") if name not in metadata]
    if "layer_counting" in missing and "method" in missing:
        raise VectorFileError(
            "a safetensors file without steerkit's metadata; give one that steerkit saved, or make a vector of its "
            "tensors with `steerkit import FILE --out v.safetensors`"
        )
    if "format" in missing:
        raise VectorFileError(f"metadata is missing: {', '.join(missing)}; fit again and save")
    if re.fullmatch("[1-9][0-9]{0,5}", metadata["format"]) is None:
        raise VectorFileError(f"format {metadata['format'][:20]!r} is unknown; this steerkit reads format {FORMAT}")
    if int(metadata["format"]) > FORMAT:
        writer = re.fullmatch(r"[0-9]+(\.[0-9A-Za-z]+)*", metadata.get("steerkit_version", ""))
        wanted = f"'steerkit-hf>={writer[0]}'" if writer else "steerkit-hf"
        raise VectorFileError(
            f"format {metadata['format']} is newer than {FORMAT}, the newest that steerkit {__version__} reads; "
            f"pip install --upgrade {wanted}"
        )
    if missing:
        raise VectorFileError(f"metadata is missing: {', '.join(missing)}; fit again and save")
    if metadata["layer_counting"] != LAYER_COUNTING:
        raise VectorFileError(
            f"layer_counting {metadata['layer_counting'][:80]!r} is unknown; it must be {LAYER_COUNTING!r}"
        )
