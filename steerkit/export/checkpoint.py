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
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.errors import ModelError
from steerkit.model.safetensors_file import DTYPES
from steerkit.network.decoder import find_decoder
from steerkit.network.stored_tensors import stored_dtype

__all__ = ["Group", "header", "in_files", "shard_names", "shards", "write_checkpoint", "write_index", "write_values"]

_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
_Tensors = dict[str, Tensor]


class Group(NamedTuple):
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
    planned = list(shards(_groups(model, metas), shard_bytes))
    for file, shard in zip(shard_names(len(planned)), planned, strict=True):
        _write_shard(model, shard, read, folder / file)
    write_index(planned, folder)


def shard_names(count: int) -> list[str]:
    """What the files of a checkpoint are called.

    Args:
        count: how many there are.
    """
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(planned: Sequence[Sequence[Group]], folder: Path) -> None:
    """Write which file holds which tensor, if there are several.

    Args:
        planned: what stands in each file.
        folder: where.
    """
    if len(planned) == 1:
        return
    total = sum(_size(entry) for shard in planned for group in shard for entry in group.entries.values())
    named = zip(shard_names(len(planned)), planned, strict=True)
    places = {name: file for file, shard in named for group in shard for name in group.entries}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def in_files(model: nn.Module, tensors: _Tensors) -> _Tensors:
    """Tensors under the names, and in the pieces, in which checkpoints of the family hold them.

    Args:
        model: the transformers model.
        tensors: its tensors [...] by their names in it; one that is only called otherwise stays the same object.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def _groups(model: nn.Module, metas: _Tensors) -> list[Group]:
    """One group for each block and for each tensor outside of them."""
    prefix = f"{find_decoder(model).path}."
    members: dict[str, _Tensors] = {}
    for name, meta in metas.items():
        block = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else name
        members.setdefault(block, {})[name] = meta
    groups = [Group(tuple(some), in_files(model, some)) for some in members.values()]
    whole = in_files(model, metas)
    if {name for group in groups for name in group.entries} != whole.keys():
        return [Group(tuple(metas), whole)]  # something is joined across blocks
    return groups


def shards(groups: Sequence[Group], limit: int) -> Iterator[list[Group]]:
    """Groups in a row, as many as fit into a file.

    Args:
        groups: what is written together.
        limit: bytes in a file; a larger group has one of its own.

    Yields:
        The groups of each file.
    """
    shard: list[Group] = []
    size = 0
    for group in groups:
        own = sum(map(_size, group.entries.values()))
        if shard and size + own > limit:
            yield shard
            shard, size = [], 0
        shard.append(group)
        size += own
    yield shard


def _write_shard(model: nn.Module, shard: Sequence[Group], read: Callable[[str], Tensor], path: Path) -> None:
    """One safetensors file: header length, header, tensors."""
    entries = {name: meta for group in shard for name, meta in group.entries.items()}
    with path.open("xb") as file:
        file.write(header(entries))
        for group in shard:
            values = in_files(model, {name: read(name) for name in group.names})
            for name, meta in group.entries.items():
                value = values.pop(name)
                if value.shape != meta.shape or value.dtype != meta.dtype:
                    raise ModelError(f"{name}: came out as {tuple(value.shape)} of {value.dtype}, not as announced")
                write_values(file, value)


def write_values(file: BinaryIO, value: Tensor) -> int:
    """Write the bytes of a tensor.

    Args:
        file: open for writing.
        value: of any shape.

    Returns:
        How many they are.
    """
    return file.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def header(entries: Mapping[str, Tensor]) -> bytes:
    """Names, dtypes, shapes and offsets, padded so that the data is aligned.

    Args:
        entries: name to tensor of any shape, on the meta device, in the order in which they are written.

    Raises:
        ModelError: a dtype that files do not know.
    """
    said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, meta in entries.items():
        if meta.dtype not in _NAMES:
            raise ModelError(f"{name}: {meta.dtype} cannot be written; load the model with dtype bfloat16 or float32")
        end = start + _size(meta)
        said[name] = {"dtype": _NAMES[meta.dtype], "shape": list(meta.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
