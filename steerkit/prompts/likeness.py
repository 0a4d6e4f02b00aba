"""Which items are alike: those that ask the same, or are the same, and so must not stand on both sides of a split.

Items with one prompt are alike, whatever is answered and whatever system prompt stands before it; so are prompts
without an answer that are the same text. Case and white space do not count. A text that every item has tells none of
them apart and ties nothing together.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeAlias

from steerkit.prompts.conversation import Conversation

__all__ = ["Group", "Sides", "Turns", "asked_by", "groups_of", "is_chained", "said_by", "turns_of"]

Sides: TypeAlias = tuple[Sequence[Conversation], Sequence[Conversation]]
Turns: TypeAlias = tuple[Sequence[int], Sequence[int]]


class Group(NamedTuple):
    """Items that stay together.

    Attributes:
        positive: their places on the positive side.
        negative: their places on the negative side.
    """

    positive: tuple[int, ...]
    negative: tuple[int, ...]


def asked_by(item: Conversation) -> Hashable:
    """What an item asks: its prompt without its system prompt, case and white space aside.

    Args:
        item: the conversation.
    """
    if isinstance(item.prompt, str):
        return _folded(item.prompt)
    turns = [turn for turn in item.prompt if turn["role"] != "system"]
    if len(turns) == 1 and turns[0]["role"] == "user":
        return _folded(turns[0].get("content"))
    return tuple((turn["role"], _folded(turn.get("content"))) for turn in turns or item.prompt)


def said_by(item: Conversation) -> Hashable:
    """The whole of an item: what it asks and what it answers, case and white space aside.

    Args:
        item: the conversation.
    """
    return asked_by(item), None if item.answer is None else _folded(item.answer)


def groups_of(sides: Sides, *, paired: bool) -> list[Group]:
    """Items that stay together, in the order of the first of each.

    Args:
        sides: positive and negative items.
        paired: whether items of the same place belong together.
    """
    if paired:
        rows = [{*_keys(one), *_keys(other)} for one, other in zip(*sides, strict=True)]
        return [Group(places, places) for places in _tied(_telling(rows))]
    rows = [keys for side in sides for keys in _telling([_keys(item) for item in side])]
    first = len(sides[0])
    return [
        Group(
            tuple(place for place in places if place < first),
            tuple(place - first for place in places if place >= first),
        )
        for places in _tied(rows)
    ]


def is_chained(group: Group, sides: Sides) -> bool:
    """Whether pairs hang together only from neighbour to neighbour: no text or prompt stands in all of them.

    Args:
        group: of pairs.
        sides: positive and negative items.
    """
    rows = [{*_keys(sides[0][place]), *_keys(sides[1][place])} for place in group.positive]
    return not set.intersection(*rows)


def turns_of(sides: Sides, *, paired: bool) -> tuple[list[int], list[int]]:
    """A number for each item by which folds and halves are dealt out; items that are alike have the same.

    Args:
        sides: positive and negative items.
        paired: whether items of the same place belong together.

    Returns:
        One list per side. Where no two items are alike, each side is counted from 0 on; so it is where all of them hang
        together, for then nothing can be kept apart.
    """
    found, counted = groups_of(sides, paired=paired), [0, 0]
    turns: tuple[list[int], list[int]] = ([0] * len(sides[0]), [0] * len(sides[1]))
    if len(found) == 1:
        return list(range(len(sides[0]))), list(range(len(sides[1])))
    for group in found:
        own = 0 if group.positive else 1  # a group that both sides have is dealt out with the positive side
        for places, side in zip(group, turns, strict=True):
            for place in places:
                side[place] = counted[own]
        counted[own] += 1
    return turns


def _folded(text: object) -> str:
    """A text without what makes no difference to what it says."""
    plain = text if isinstance(text, str) else json.dumps(text, sort_keys=True, default=str)
    return " ".join(plain.casefold().split())


def _keys(item: Conversation) -> set[Hashable]:
    """What makes two items one: the same question, or the same answer."""
    return {("asked", asked_by(item)), ("said", said_by(item))}


def _telling(rows: Sequence[set[Hashable]]) -> list[set[Hashable]]:
    """The keys of each row without those that every row has."""
    counts = Counter(key for keys in rows for key in keys)
    return [{key for key in keys if len(rows) == 1 or counts[key] < len(rows)} for keys in rows]


def _tied(rows: Sequence[set[Hashable]]) -> list[tuple[int, ...]]:
    """Places of rows that share keys, directly or through others, in the order of the first of each."""
    home = list(range(len(rows)))

    def root(place: int) -> int:
        while home[place] != place:
            home[place] = home[home[place]]
            place = home[place]
        return place

    owner: dict[Hashable, int] = {}
    for place, keys in enumerate(rows):
        for key in keys:
            first, second = sorted((root(owner.setdefault(key, place)), root(place)))
            home[second] = first
    found: dict[int, list[int]] = {}
    for place in range(len(rows)):
        found.setdefault(root(place), []).append(place)
    return [tuple(places) for places in found.values()]
