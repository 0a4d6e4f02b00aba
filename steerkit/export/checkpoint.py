"""A checkpoint in the format of `save_pretrained`, written tensor by tensor.

`save_pretrained` gathers a whole shard in memory, and a changed model would be a second one. Here names and shapes are
known before any number is (tensors on the meta device), so that each file's header is written first and then one tensor
after the other, read, changed and forgotten. What transformers renames or splits when it saves (experts, which it keeps
stacked, are single matrices in files) is done one block at a time.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.errors import ModelError
from steerkit.export.stored_tensors import stored_dtype
from steerkit.network.decoder import find_decoder

__all__ = ["write_checkpoint"]

_DTYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
)
_Tensors = dict[str, Tensor]


class _Group(NamedTuple):
    """Tensors that are written together.

    Attributes:
        names: what the model calls them.
        entries: what the file calls them, in the order they are written, as tensors on the meta device.
    """

    names: tuple[str, ...]
    entries: _Tensors


def write_checkpoint(
    model: nn.Module,
    shapes: Mapping[str, torch.Size],
    read: Callable[[str], Tensor],
    folder: Path,
    shard_bytes: int,
) -> None:
    """Write safetensors files and, if there are several, their index. One block is in memory at a time.

    Args:
        model: the transformers model whose weights these are, for their dtypes and the names they have in files.
        shapes: name in the model to shape, of all that is written.
        read: gives the values [...] of one of them, by its name.
        folder: where, already made.
        shard_bytes: the size at which a new file begins.

    Raises:
        ModelError: a dtype that files do not know.
        OSError: it cannot be written.
    """
    metas = {name: torch.empty(shape, dtype=stored_dtype(model, name), device="meta") for name, shape in shapes.items()}
    shards = list(_shards(_groups(model, metas), shard_bytes))
    total = sum(_size(entry) for shard in shards for group in shard for entry in group.entries.values())
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = several if len(shards) > 1 else "model.safetensors"
        _write_shard(model, shard, read, folder / file)
        places |= {name: file for group in shard for name in group.entries}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _in_files(model: nn.Module, tensors: _Tensors) -> _Tensors:
    """Tensors under the names, and in the pieces, in which checkpoints of the family hold them."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def _groups(model: nn.Module, metas: _Tensors) -> list[_Group]:
    """One group for each block and for each tensor outside of them."""
    prefix = f"{find_decoder(model).path}."
    members: dict[str, _Tensors] = {}
    for name, meta in metas.items():
        block = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else name
        members.setdefault(block, {})[name] = meta
    groups = [_Group(tuple(some), _in_files(model, some)) for some in members.values()]
    whole = _in_files(model, metas)
    if {name for group in groups for name in group.entries} != whole.keys():
        return [_Group(tuple(metas), whole)]  # something is joined across blocks
    return groups


def _shards(groups: Sequence[_Group], limit: int) -> Iterator[list[_Group]]:
    """Groups in a row, as many as fit into a file."""
    shard: list[_Group] = []
    size = 0
    for group in groups:
        own = sum(map(_size, group.entries.values()))
        if shard and size + own > limit:
            yield shard
            shard, size = [], 0
        shard.append(group)
        size += own
    yield shard


def _write_shard(model: nn.Module, shard: Sequence[_Group], read: Callable[[str], Tensor], path: Path) -> None:
    """One safetensors file: header length, header, tensors."""
    entries = {name: meta for group in shard for name, meta in group.entries.items()}
    with path.open("xb") as file:
        file.write(_header(entries))
        for group in shard:
            values = _in_files(model, {name: read(name) for name in group.names})
            for name, meta in group.entries.items():
                value = values.pop(name)
                if value.shape != meta.shape or value.dtype != meta.dtype:
                    raise ModelError(f"{name}: came out as {tuple(value.shape)} of {value.dtype}, not as announced")
                flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
                file.write(flat.numpy().data)


def _header(entries: _Tensors) -> bytes:
    """Names, dtypes, shapes and offsets, padded so that the data is aligned.

    Raises:
        ModelError: a dtype that files do not know.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, meta in entries.items():
        if meta.dtype not in _DTYPES:
            raise ModelError(f"{name}: {meta.dtype} cannot be written; load the model with dtype bfloat16 or float32")
        end = start + _size(meta)
        header[name] = {"dtype": _DTYPES[meta.dtype], "shape": list(meta.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
