"""What several texts begin with, such as system prompts: found here, read once by whoever runs the model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

__all__ = ["beginnings"]

_PASS = 12  # columns that a pass of its own costs beside those that it reads
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
