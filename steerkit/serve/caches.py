"""Caches of rows that end in one column: joined, parted, cut and kept.

A cache of transformers (`DynamicCache`) holds for each layer keys and values [b, heads, columns, width], of layers with
a sliding window only the last columns of it. Rows are padded at the left, so that two caches are joined by padding the
narrower one, and what is padding in all rows is cut off. Only caches that are keys and values alone can be treated so
(`is_attention_cache`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["bytes_of", "columns_of", "cut", "joined", "kept_rows"]


def columns_of(cache: Any) -> int:
    """How many columns a cache holds, those included that sliding windows have dropped.

    Args:
        cache: an attention cache.
    """
    return int(cache.get_seq_length())


def joined(caches: Sequence[Any]) -> Any:
    """One cache with the rows of several, one below the other.

    Args:
        caches: attention caches of one model; the first one is changed and given back.
    """
    first, width = caches[0], max(map(columns_of, caches))
    for place, layer in enumerate(first.layers):
        parts = [one.layers[place] for one in caches]
        held = _held(layer, width)
        layer.keys = torch.cat([_padded(part.keys, held) for part in parts])
        layer.values = torch.cat([_padded(part.values, held) for part in parts])
        _count(layer, width)
    return first


def kept_rows(cache: Any, rows: Sequence[int], width: int) -> Any:
    """Some rows of a cache, as wide as the longest of them.

    Args:
        cache: an attention cache; it is changed and given back.
        rows: which rows, in the order wanted; one may be wanted several times.
        width: columns that are no padding in all of them.
    """
    for layer in cache.layers:
        chosen = torch.tensor(rows, dtype=torch.long, device=layer.keys.device)
        held = min(_held(layer, width), layer.keys.shape[-2])
        layer.keys, layer.values = (one[chosen][..., -held:, :] for one in (layer.keys, layer.values))
        _count(layer, width)
    return cache


def cut(cache: Any, row: int, length: int, columns: int) -> Any | None:
    """The beginning of one row's text as a cache of its own.

    Args:
        cache: an attention cache; it stays as it is.
        row: which row.
        length: real tokens of that row in the cache.
        columns: how many of them are kept, at least 1.

    Returns:
        The cache, with tensors of its own; None where a sliding window has dropped what a continuation would read.
    """
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    behind = length - columns
    for layer in made.layers:
        held, needed = layer.keys.shape[-2], _held(layer, columns)
        end = held - behind
        if end < needed:
            return None
        layer.keys, layer.values = (
            one[row : row + 1, :, end - needed : end].clone() for one in (layer.keys, layer.values)
        )
        _count(layer, columns)
    return made


def bytes_of(cache: Any) -> int:
    """What a cache takes.

    Args:
        cache: an attention cache.
    """
    return sum(tensor.nbytes for tensor in _tensors(cache))


def _tensors(cache: Any) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


def _held(layer: Any, width: int) -> int:
    """How many columns a layer holds of so many."""
    return min(width, layer.sliding_window - 1) if layer.is_sliding else width


def _count(layer: Any, width: int) -> None:
    """Tell a layer with a sliding window how many tokens it holds; it counts them itself."""
    if layer.is_sliding:
        layer.cumulative_length = width


def _padded(tensor: Tensor, columns: int) -> Tensor:
    """A tensor [b, heads, t, width] with empty columns before its own; masked, whatever is in them."""
    return pad(tensor, (0, 0, columns - tensor.shape[-2], 0))
