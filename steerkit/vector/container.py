"""The vector file's bytes: a safetensors container with a digest over all of it.

8 bytes header length, a JSON header, raw tensors named ``<site>/<param>`` or ``shared/<param>``. Steerkit writes the
container itself because the same vector must give the same bytes (the safetensors writer orders metadata at random),
and because the digest covers every byte: it is the sha256 of the whole file with 64 zeros in the digest's place.
Reading checks the container first (`container_checks`) and then goes through safetensors. Pickles are neither written
nor read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import VectorFileError

__all__ = [
    "BLANK_DIGEST",
    "DTYPES",
    "DTYPE_NAMES",
    "FORMAT",
    "LAYER_COUNTING",
    "MAX_DIMENSIONS",
    "MAX_HEADER_BYTES",
    "MAX_TENSORS",
    "REQUIRED",
    "digest_entry",
    "lay_out",
    "signed",
]

FORMAT = 1
LAYER_COUNTING = "blocks from 0, resid_post.N is the output of block N"
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 4096
MAX_DIMENSIONS = 8
BLANK_DIGEST = "0" * 64
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
REQUIRED = ("method", "edit", "scope", "unit", "sites", "model_type", "hidden_size", "num_layers")


def lay_out(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """Lay out a safetensors file, widest dtypes first so that every tensor is aligned.

    Args:
        metadata: what stands in the header, as text.
        tensors: name to tensor [...] of any shape, on the CPU.

    Raises:
        VectorFileError: text that is no Unicode, or too much of it.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts: list[bytes] = []
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda entry: (-entry[1].dtype.itemsize, entry[0])):
        parts.append(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    try:
        head = json.dumps(header, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise VectorFileError(
            f"the metadata holds {error.object[error.start : error.end]!r}, which is no Unicode"
        ) from None
    head += b" " * (-len(head) % 8)
    if len(head) > MAX_HEADER_BYTES:
        raise VectorFileError(f"{len(head)} bytes of metadata are too many (at most {MAX_HEADER_BYTES}); store less")
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def digest_entry(digest: str) -> bytes:
    """The bytes with which a digest stands in the header.

    Args:
        digest: 64 hex digits.
    """
    # Quotes inside JSON text are escaped, so these bytes can stand nowhere else in the header.
    return f'"digest":"{digest}"'.encode()


def signed(unsigned: bytes) -> bytes:
    """Put the digest in its place.

    Args:
        unsigned: a file with `BLANK_DIGEST` there.
    """
    digest = hashlib.sha256(unsigned).hexdigest()
    return unsigned.replace(digest_entry(BLANK_DIGEST), digest_entry(digest), 1)
