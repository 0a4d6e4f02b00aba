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
from typing import TYPE_CHECKING, Any

from steerkit.errors import VectorFileError

if TYPE_CHECKING:
    from steerkit.vector.tensors import Stored

__all__ = [
    "BLANK_DIGEST",
    "FORMAT",
    "ITEM_BYTES",
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
ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
)
"""How wide the numbers of each dtype are, under safetensors' names."""
REQUIRED = ("method", "edit", "scope", "unit", "sites", "model_type", "hidden_size", "num_layers")


def lay_out(metadata: Mapping[str, str], tensors: Mapping[str, Stored]) -> bytes:
    """Lay out a safetensors file, widest dtypes first so that every tensor is aligned.

    Args:
        metadata: what stands in the header, as text.
        tensors: name to tensor.

    Raises:
        VectorFileError: text that is no Unicode, or too much of it.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts: list[Any] = []
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda entry: (-ITEM_BYTES[entry[1].dtype], entry[0])):
        parts.append(tensor.data)
        begin, end = end, end + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
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
