"""A safetensors file, read a tensor or some of its rows at a time; nothing of it is mapped into memory.

8 bytes header length, a JSON header, raw tensors (https://github.com/huggingface/safetensors). A mapped file counts as
memory of the process where its size is limited, and as private memory in the way that torch maps it.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerkit.errors import ModelError

__all__ = ["DTYPES", "Entry", "SafetensorsFile"]

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
        "U16": torch.uint16,
        "U32": torch.uint32,
        "U64": torch.uint64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "C64": torch.complex64,
    }
)
"""Of safetensors' names."""
_MAX_HEADER = 100 * 2**20
_OWN_PAGES = 2**20


class Entry(NamedTuple):
    """One tensor of a file.

    Attributes:
        dtype: of its numbers.
        shape: its dimensions.
        start: where its bytes begin in the file.
        size: how many they are.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class SafetensorsFile:
    """Where the tensors of a file are.

    Attributes:
        path: the file.
        entries: name to place, in the order of the bytes.
        metadata: the texts in its header.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> SafetensorsFile:
        """Read a file's header and check that the bytes are there.

        Args:
            path: the file.

        Raises:
            ModelError: it is damaged, or cannot be read.
        """
        try:
            length, total, header = _header(path)
            metadata = header.pop("__metadata__", {})
            entries = {name: _entry(said, 8 + length, total) for name, said in header.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) or type(error).__name__
            raise ModelError(f"{path}: is no whole safetensors file ({reason}); get it anew") from error
        ordered = dict(sorted(entries.items(), key=lambda one: (one[1].start, one[0])))
        return cls(path, ordered, metadata)

    def read(self, tensor: str) -> Tensor:
        """A tensor as it is stored, [...].

        Args:
            tensor: its name.
        """
        entry = self.entries[tensor]
        return self._bytes(entry.start, entry.size).view(entry.dtype).reshape(entry.shape)

    def rows(self, tensor: str, start: int, stop: int) -> Tensor:
        """Some rows [k, ...] of a tensor as it is stored, k being stop - start.

        Args:
            tensor: its name; it has a dimension at least.
            start: the first row.
            stop: the row behind the last, at most as many as there are.
        """
        entry = self.entries[tensor]
        of_row = entry.size // max(1, entry.shape[0])
        flat = self._bytes(entry.start + start * of_row, (stop - start) * of_row)
        return flat.view(entry.dtype).reshape(stop - start, *entry.shape[1:])

    def _bytes(self, start: int, size: int) -> Tensor:
        """Bytes of the file, [size] uint8.

        Raises:
            ModelError: the file has become shorter.
        """
        found = _memory(size)
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            view, got = found.numpy().data, 0
            while got < size:
                more = file.readinto(view[got:])
                if not more:
                    raise ModelError(f"{self.path}: ended while it was read; get it anew")
                got += more
        return found


def _memory(size: int) -> Tensor:
    """Room for bytes, [size] uint8.

    Large ones have pages of their own, which the system gets back with them. Of what the C library gives, small things
    that live longer take a part of each place, and the next weight, of the same size, needs another.
    """
    if size < _OWN_PAGES:
        return torch.empty(size, dtype=torch.uint8)
    private = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, size, **private), dtype=torch.uint8)


def _header(path: Path) -> tuple[int, int, dict[str, Any]]:
    """The header's length, the file's, and what stands in it.

    Raises:
        ValueError: there is no header.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(_MAX_HEADER, total - 8):
            raise ValueError(f"a header of {length} bytes in a file of {total}")
        return length, total, json.loads(file.read(length))


def _entry(said: Any, begin: int, total: int) -> Entry:
    """One tensor of a header.

    Raises:
        ValueError: its bytes are not in the file, or are not as many as its shape says.
    """
    dtype, shape, (start, end) = DTYPES[said["dtype"]], tuple(said["shape"]), said["data_offsets"]
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"a tensor of shape {list(shape)}")
    if end - start != math.prod(shape) * dtype.itemsize or start < 0 or begin + end > total:
        raise ValueError(f"a tensor of {list(shape)} at {start} to {end} of {total - begin} bytes")
    return Entry(dtype, shape, begin + start, end - start)
