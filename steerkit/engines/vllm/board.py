"""`Board`: all numbers that the model's graph reads, at addresses that stay, and the room that they take.

A step's tokens belong to rows (0 for all plain ones, one for each steered request). A place of the model holds for each
row and level which entry writes there and by which of the request's terms; an entry holds two directions and what
is added along them. Entry 0 is nothing. So one graph serves every mix of requests, and a plain token comes out bitwise.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from steerkit.maths.rank_two import RankTwo, offsets

__all__ = ["Board", "Room"]


class Room:
    """Which entries are taken: counted by reference, kept while there is room, and evicted oldest first.

    Args:
        size: entries, the first of which is never given.

    Example:
        >>> room = Room(3)
        >>> room.take("a"), room.take("a"), room.take("b")
        ((1, True), (1, False), (2, True))
        >>> room.give("b"); room.take("c"), room.take("d")
        ((2, True), None)
    """

    def __init__(self, size: int) -> None:
        self._free = list(range(size - 1, 0, -1))
        self._at: dict[Hashable, int] = {}
        self._count: dict[Hashable, int] = {}
        self._idle: OrderedDict[Hashable, None] = OrderedDict()

    def take(self, key: Hashable) -> tuple[int, bool] | None:
        """An entry for a key, and whether it has to be filled; None where there is no room.

        Args:
            key: what is to be kept there.
        """
        if key in self._at:
            self._idle.pop(key, None)
            self._count[key] += 1
            return self._at[key], False
        if not self._free and self._idle:
            oldest, _ = self._idle.popitem(last=False)
            self._free.append(self._at.pop(oldest))
            del self._count[oldest]
        if not self._free:
            return None
        self._at[key], self._count[key] = self._free.pop(), 1
        return self._at[key], True

    def give(self, key: Hashable) -> None:
        """Give an entry back; it is kept until its place is needed.

        Args:
            key: that was taken.
        """
        self._count[key] -= 1
        if not self._count[key]:
            self._idle[key] = None

    def grow(self, before: int, after: int) -> None:
        """Add entries.

        Args:
            before: entries so far.
            after: entries from now on.
        """
        self._free = [*range(after - 1, before - 1, -1), *self._free]


class Board:
    """The tensors that the graph reads.

    Args:
        places: how many are written.
        rows: steered requests at one time.
        tokens: of one step, at most.
        width: of the residual stream.
        entries: that fit.
        levels: vectors of one request at one place.
        terms: vectors of one request.
        device: of the model.
    """

    def __init__(
        self,
        *,
        places: int,
        rows: int,
        tokens: int,
        width: int,
        entries: int,
        levels: int,
        terms: int,
        device: torch.device,
    ) -> None:
        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        self.device, self.levels, self.tokens = device, levels, tokens
        self.row, self.place = whole(tokens), torch.arange(tokens, device=device)
        self.on = torch.zeros(terms, tokens, dtype=torch.bool, device=device)
        self.lead = torch.zeros(terms, tokens, 7, dtype=torch.float32, device=device)
        self.entry, self.term = whole(places, levels, rows + 1), whole(places, levels, rows + 1)
        self._make(entries, width)
        self.room = Room(entries)

    def _make(self, entries: int, width: int) -> None:
        exact, device = torch.float32, self.device
        self.directions = torch.zeros(entries, width, dtype=exact, device=device)
        self.offsets = torch.zeros(entries, 4, dtype=exact, device=device)
        self.threshold = torch.full((entries,), -torch.inf, dtype=exact, device=device)
        self.second = torch.zeros(entries, dtype=torch.long, device=self.device)

    @property
    def entries(self) -> int:
        """How many fit."""
        return len(self.directions)

    def take(self, key: Hashable, edit: RankTwo) -> tuple[int, bool]:
        """The entry that holds an edit.

        Args:
            key: what tells the edit from others.
            edit: its numbers.

        Returns:
            The entry, and whether the board had to grow for it, so that its old addresses hold no longer.
        """
        has_second = bool(edit.basis[1].any())
        keys = [key, (key, "second")] if has_second else [key]
        grown = False
        while True:
            taken = [self.room.take(one) for one in keys]
            if None not in taken:
                break
            for one, found in zip(keys, taken, strict=True):
                if found is not None:
                    self.room.give(one)
            self._grow()
            grown = True
        places = [found[0] for found in taken if found is not None]
        if any(found[1] for found in taken if found is not None):
            self._fill(places, edit)
        return places[0], grown

    def _fill(self, places: Sequence[int], edit: RankTwo) -> None:
        for place, direction in zip(places, edit.basis, strict=False):
            self.directions[place].copy_(direction, non_blocking=True)
        first, second = places[0], (*places, 0)[1]
        self.offsets[first].copy_(offsets(edit), non_blocking=True)
        self.threshold[first], self.second[first] = edit.threshold, second

    def give(self, key: Hashable, *, has_second: bool) -> None:
        """Give an edit's entries back.

        Args:
            key: that was taken.
            has_second: whether it has two directions.
        """
        self.room.give(key)
        if has_second:
            self.room.give((key, "second"))

    def _grow(self) -> None:
        old = self.directions, self.offsets, self.threshold, self.second
        before = self.entries
        self._make(2 * before, old[0].shape[1])
        for new, kept in zip((self.directions, self.offsets, self.threshold, self.second), old, strict=True):
            new[:before].copy_(kept)
        self.room.grow(before, 2 * before)
