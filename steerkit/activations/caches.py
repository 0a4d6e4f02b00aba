"""Caches of keys and values that several rows go on from: picked row by row, and with their pads put first."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["joined", "pads_first", "row_of", "rows_of"]


def rows_of(cache: Any, rows: Tensor) -> Any:
    """A cache of some rows of another, which stays as it is.

    Args:
        cache: keys and values of every layer (`steerkit.tokens.transformers_facts.is_attention_cache`).
        rows: [n] which of its rows, any of them any number of times.
    """
    found = _apart(cache)
    found.batch_select_indices(rows)
    return found


def row_of(cache: Any, row: int, length: int) -> Any:
    """A cache of one row of another, without its pads and without memory of its own.

    Args:
        cache: keys and values of every layer, pads first.
        row: which.
        length: columns that are no pads.
    """
    found = _apart(cache)
    for layer in found.layers:
        start = layer.keys.shape[2] - length
        layer.keys, layer.values = (one[row : row + 1, :, start:] for one in (layer.keys, layer.values))
    return found


def joined(caches: Sequence[Any]) -> Any:
    """A cache of several of one row each, in their order, pads first; they stay as they are.

    Args:
        caches: keys and values of every layer, of any lengths.
    """
    found = rows_of(caches[0], torch.zeros(1, dtype=torch.long))
    for place, layer in enumerate(found.layers):
        for name in ("keys", "values"):
            rows = [getattr(cache.layers[place], name) for cache in caches]
            width = max(row.shape[2] for row in rows)
            setattr(layer, name, torch.cat([pad(row, (0, 0, width - row.shape[2], 0)) for row in rows]))
    return found


def pads_first(cache: Any, ends: Tensor, width: int) -> None:
    """Move the pads that stand behind each row's tokens before them, so that what follows joins on, in place.

    Args:
        cache: keys and values of every layer; their columns carry their positions with them.
        ends: [b] the column behind the last token of each row, on the CPU; the longest has no pads.
        width: columns that are left, the last ones; those before hold pads in every row.
    """
    columns = int(ends.max())
    if width == columns and bool((ends == columns).all()):
        return
    moved = ((torch.arange(columns) + ends[:, None]) % columns)[:, columns - width :]
    for layer in cache.layers:
        at = moved[:, None, :, None].to(layer.keys.device)
        layer.keys, layer.values = (torch.take_along_dim(one, at, dim=2) for one in (layer.keys, layer.values))


def _apart(cache: Any) -> Any:
    """A cache of the same tensors, which can be replaced without those of the other one."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found
