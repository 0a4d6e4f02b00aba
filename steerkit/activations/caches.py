"""Caches of keys and values that several rows go on from: picked row by row, and with their pads put first."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["common_beginning", "pads_first", "rows_of"]

_LEAST = 8  # tokens in common for which a pass of their own is worth it


def common_beginning(texts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The ids that all texts begin with; none where that would save hardly a token.

    Args:
        texts: the ids of different texts.

    Example:
        >>> common_beginning([(*range(9), 12), (*range(9), 13)])
        (0, 1, 2, 3, 4, 5, 6, 7, 8)
        >>> common_beginning([(0, 1, 2), (0, 1, 3)])
        ()
    """
    if len(texts) < 2:
        return ()
    columns = zip(*texts, strict=False)
    common = tuple(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    return common if len(common) >= _LEAST else ()


def rows_of(cache: Any, rows: Tensor) -> Any:
    """A cache of some rows of another, which stays as it is.

    Args:
        cache: keys and values of every layer (`steerkit.tokens.transformers_facts.is_attention_cache`).
        rows: [n] which of its rows, any of them any number of times.
    """
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    found.batch_select_indices(rows)
    return found


def pads_first(cache: Any, ends: Tensor) -> None:
    """Move the pads that stand behind each row's tokens before them, so that what follows joins on, in place.

    Args:
        cache: keys and values of every layer; their columns carry their positions with them.
        ends: [b] tokens of each row, on the CPU; the longest has no pads.
    """
    width = int(ends.max())
    if bool((ends == width).all()):
        return
    moved = (torch.arange(width) + ends[:, None]) % width
    for layer in cache.layers:
        at = moved[:, None, :, None].to(layer.keys.device)
        layer.keys, layer.values = (torch.take_along_dim(one, at, dim=2) for one in (layer.keys, layer.values))
