"""Which items are held out: a share of them, drawn by a seed, so that no item asks what one that is fitted on asks."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from steerkit.errors import DataError
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.likeness import Sides, asked_by, groups_of, is_chained

__all__ = ["Marks", "drawn", "half_of", "known_items", "warn_of_known_items"]


class Marks(NamedTuple):
    """Which items are held out.

    Attributes:
        positive: a mark for each item of the positive side.
        negative: a mark for each item of the negative side.
        paired: whether both parts are still pairs.
    """

    positive: tuple[bool, ...]
    negative: tuple[bool, ...]
    paired: bool


def drawn(sides: Sides, *, paired: bool, share: float, seed: int) -> Marks:
    """Draw a share of the items; those that are alike (`steerkit.prompts.likeness`) stay together.

    Pairs stay together too, unless their texts recur in other pairs so that hardly any pair can be told from the rest:
    then each side is drawn on its own, and the parts are no pairs.

    Args:
        sides: positive and negative items.
        paired: whether items of the same place belong together.
        share: how many are held out, over 0 and under 1.
        seed: of the draw.

    Returns:
        The marks. Where no two items are alike, so many as the share says; else as near to it as groups allow.

    Raises:
        DataError: the share is not between 0 and 1, or a part would be empty.

    Warns:
        UserWarning: pairs come apart.
    """
    wanted = [_count(len(side), share) for side in sides]
    groups = groups_of(sides, paired=paired)
    if paired:
        largest = max(groups, key=lambda group: len(group.positive))
        if 2 * len(largest.positive) <= len(sides[0]) or not is_chained(largest, sides):
            marks = _marks([group.positive for group in groups], wanted[0], share, seed)
            return Marks(marks, marks, True)
        warnings.warn(
            f"{len(largest.positive)} of {len(sides[0])} pairs share texts with one another, so pairs cannot be held "
            "out: each side is split on its own, and its parts are no pairs",
            stacklevel=3,
        )
        groups = groups_of(sides, paired=False)
    positive = _marks([group.positive for group in groups if group.positive], wanted[0], share, seed)
    beside: dict[bool, list[int]] = {True: [], False: []}  # where the negative side has the same, it goes the same way
    for group in groups:
        if group.positive:
            beside[positive[group.positive[0]]].extend(group.negative)
    free = [group.negative for group in groups if not group.positive]
    return Marks(positive, _marks(free, wanted[1], share, seed, beside[True], beside[False]), False)


def half_of(items: Sequence[Conversation], number: int) -> tuple[Conversation, ...]:
    """Every second item, those that ask the same counted once and kept together.

    Args:
        items: any conversations.
        number: 0 for the half with the first item, else 1.
    """
    place: dict[object, int] = {}
    for item in items:
        place.setdefault(asked_by(item), len(place))
    return tuple(item for item in items if place[asked_by(item)] % 2 == number % 2)


def known_items(fitted: Sides, held_out: Sides) -> int:
    """How many held-out items ask what an item that is fitted on asks.

    Args:
        fitted: both sides of what is fitted on.
        held_out: both sides of what is measured on.

    Returns:
        The number on the side that has more of them.
    """
    known = {asked_by(item) for side in fitted for item in side}
    return max(sum(asked_by(item) in known for item in side) for side in held_out)


def warn_of_known_items(fitted: Sides, held_out: Sides) -> None:
    """Say that items are measured on which are fitted on as well.

    Args:
        fitted: both sides of what is fitted on.
        held_out: both sides of what is measured on.

    Warns:
        UserWarning: there are some.
    """
    count, size = known_items(fitted, held_out), max(map(len, held_out))
    if count:
        warnings.warn(
            f"{count} of {size} held-out items have a prompt that is fitted on as well, so figures measured on them "
            "are too good; hold out other prompts",
            stacklevel=3,
        )


def _count(size: int, share: float) -> int:
    """How many of `size` items are held out."""
    if not 0 < share < 1:
        raise DataError(f"held_out={share}: give a share between 0 and 1, such as 0.25")
    count = math.floor(size * share + 0.5)
    if not 0 < count < size:
        raise DataError(
            f"held_out={share} of {size} items would hold out {count} and leave a part empty; "
            "give more items or a share nearer to one half"
        )
    return count


def _marks(
    groups: Sequence[tuple[int, ...]],
    wanted: int,
    share: float,
    seed: int,
    held: Sequence[int] = (),
    kept: Sequence[int] = (),
) -> tuple[bool, ...]:
    """Marks of one side: groups are drawn until as many items as wanted are held out, or nearly so.

    Args:
        groups: places of the items of each.
        wanted: how many items.
        share: the same as a share, of the groups.
        seed: of the draw.
        held: places that are held out already.
        kept: places that are not.

    Raises:
        DataError: a part would be empty.
    """
    chosen, left = set(held), len(groups)
    for number in _order(len(groups), share, seed):
        is_nearer = abs(len(chosen) + len(groups[number]) - wanted) < abs(len(chosen) - wanted)
        if is_nearer and (kept or left > 1):
            chosen.update(groups[number])
            left -= 1
    if not chosen and left > 1:
        chosen.update(sorted(groups, key=len)[0])
    size = len(held) + len(kept) + sum(map(len, groups))
    if not 0 < len(chosen) < size:
        raise DataError(
            f"held_out={share} of {size} items leaves a part empty, because those with the same prompt stay together; "
            "give items with other prompts"
        )
    return tuple(place in chosen for place in range(size))


def _order(count: int, share: float, seed: int) -> list[int]:
    """All groups in the order they are drawn in: the share of them first, the same as if each were one item."""
    generator = random.Random(seed)
    first = generator.sample(range(count), math.floor(count * share + 0.5))
    others = sorted(set(range(count)) - set(first))
    generator.shuffle(others)
    return first + others
