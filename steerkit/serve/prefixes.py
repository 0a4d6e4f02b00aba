"""`Prefixes`: what was read of texts is kept, so that the next turn of a chat does not read it again.

A beginning is told by its ids and by how it was steered: what a steered text has put into a cache is never given to
another steering. Of a text only the part is kept that a longer prompt would be steered in the same way in
(`PlannedRow.settled`): with a scope that counts from the prompt's end, that is the prompt without the answer.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from steerkit.serve.caches import bytes_of, cut

__all__ = ["NOTHING", "Known", "Prefixes"]


class _Kept(NamedTuple):
    """The beginning of a text."""

    steering: Hashable
    ids: tuple[int, ...]


class Known(NamedTuple):
    """What of a text has been read.

    Attributes:
        cache: what that left; None where it is nothing.
        tokens: how many, from its first one on.
    """

    cache: Any
    tokens: int


NOTHING = Known(None, 0)


class Prefixes:
    """Beginnings of texts, as long as there is room; what was used longest ago goes first.

    Args:
        budget: bytes that may be kept.

    Attributes:
        budget: as given.
        used: bytes that are kept.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._caches: OrderedDict[_Kept, Any] = OrderedDict()
        self.used = 0

    def __len__(self) -> int:
        return len(self._caches)

    def find(self, steering: Hashable, ids: Sequence[int]) -> Known:
        """The longest known beginning of a prompt, without its last token, which has to be read to go on.

        Args:
            steering: how it is steered.
            ids: the prompt.

        Returns:
            What is known, with a cache of its own.
        """
        prompt = tuple(ids[:-1])
        found = [(_shared(key.ids, prompt), key) for key in self._caches if key.steering == steering]
        for length, key in sorted(found, key=lambda one: -one[0]):
            if length == 0:
                break
            cache = cut(self._caches[key], 0, len(key.ids), length)
            if cache is not None:
                self._caches.move_to_end(key)
                return Known(cache, length)
        return NOTHING

    def keep(self, steering: Hashable, ids: Sequence[int], cache: Any) -> None:
        """Keep the beginning of a text, in place of shorter ones of it.

        Args:
            steering: how it was steered.
            ids: of it.
            cache: of these ids, as `cut` gives it.
        """
        key, size = _Kept(steering, tuple(ids)), bytes_of(cache)
        if size > self.budget:
            return
        for other in [one for one in self._caches if one.steering == steering and one.ids == key.ids[: len(one.ids)]]:
            self._drop(other)
        while self.used + size > self.budget:
            self._drop(next(iter(self._caches)))
        self._caches[key] = copy.copy(cache)
        self.used += size

    def knows(self, steering: Hashable, ids: Sequence[int]) -> bool:
        """Whether a text is the beginning of one that is kept.

        Args:
            steering: how it is steered.
            ids: of the text.
        """
        wanted = tuple(ids)
        return any(key.steering == steering and key.ids[: len(wanted)] == wanted for key in self._caches)

    def clear(self) -> None:
        """Forget all."""
        self._caches.clear()
        self.used = 0

    def _drop(self, key: _Kept) -> None:
        self.used -= bytes_of(self._caches.pop(key))


def _shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many ids two texts begin with in common."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low
