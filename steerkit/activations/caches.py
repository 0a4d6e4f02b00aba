"""Caches of keys and values that several rows go on from: picked row by row, and with their pads put first."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["beginnings", "joined", "pads_first", "rows_of"]

_PASS = 8  # columns that a pass of its own costs beside those that it reads
_DEPTH = 8  # how often texts are parted at most: by a template's first words, system prompts, what questions begin with


def beginnings(texts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What to read of each text once for all that begin with it, so that the fewest columns are read.

    Texts behind one system prompt share it, those behind two share two. A text that begins like no other among some
    that do has its beginning for itself, all but its last token: what is left of all texts is padded to the longest.

    Args:
        texts: the ids of different texts.

    Returns:
        By text the ids; of all texts none where that would save nothing.

    Example:
        >>> system = tuple(range(20))
        >>> beginnings([(*system, 31), (*system, 32), (*system, 33)]) == [system] * 3
        True
        >>> beginnings([(0, 1, 2), (0, 1, 3)])
        [(), ()]
    """
    return min([()] * len(texts), _parted(texts, _DEPTH), key=lambda begun: _columns(texts, begun))


def _parted(texts: Sequence[tuple[int, ...]], depth: int) -> list[tuple[int, ...]]:
    """See `beginnings`: what all begin with, or what each group of those that go on alike begins with."""
    if len(texts) == 1:
        return [texts[0][:-1]]
    columns = zip(*texts, strict=False)
    common = tuple(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    whole = [common] * len(texts)
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, text in enumerate(texts):
        groups.setdefault(text[len(common) : len(common) + 1], []).append(place)
    if depth == 0 or len(groups) == len(texts):
        return whole
    parts = list(whole)
    for places in groups.values():
        for place, begun in zip(places, _parted([texts[place] for place in places], depth - 1), strict=True):
            parts[place] = begun
    return min(whole, parts, key=lambda begun: _columns(texts, begun))


def _columns(texts: Sequence[tuple[int, ...]], begun: Sequence[tuple[int, ...]]) -> float:
    """How many columns are read where texts begin so; without end where one alone begins with nothing."""
    once = set(begun)
    if () in once and len(once) > 1:
        return float("inf")
    rests = max(len(text) - len(one) for text, one in zip(texts, begun, strict=True))
    return sum(len(one) + _PASS for one in once if one) + len(texts) * rests


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
