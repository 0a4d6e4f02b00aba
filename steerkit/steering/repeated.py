"""Rows that stand in a batch more than once, so that what is the same for all of them is computed once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Repeated"]


@dataclass(frozen=True)
class Repeated:
    """Which rows of a batch are the same.

    Attributes:
        firsts: by different row, where it stands first.
        places: by row, which of the different ones it is.
    """

    firsts: tuple[int, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Hashable]) -> Repeated:
        """Find equal rows.

        Args:
            rows: what tells them apart.

        Example:
            >>> Repeated.of(["a", "b", "a"])
            Repeated(firsts=(0, 1), places=(0, 1, 0))
        """
        first: dict[Hashable, int] = {}
        for row in rows:
            first.setdefault(row, len(first))
        places = tuple(first[row] for row in rows)
        return cls(tuple(map(places.index, range(len(first)))), places)

    def in_order(self, rows: Sequence[Any]) -> Repeated:
        """The same with the different rows in their own order, not in that of the batch.

        Args:
            rows: what they were found by, of a kind that has an order.

        Example:
            >>> Repeated.of(["b", "a", "b"]).in_order(["b", "a", "b"])
            Repeated(firsts=(1, 0), places=(1, 0, 1))
        """
        order = sorted(range(len(self.firsts)), key=lambda number: rows[self.firsts[number]])
        return Repeated(tuple(self.firsts[number] for number in order), tuple(map(order.index, self.places)))

    @property
    def any(self) -> bool:
        """Whether a row stands there twice."""
        return len(self.firsts) < len(self.places)

    @property
    def once(self) -> Tensor:
        """[different rows] int64, on the CPU: takes each of them once out of all."""
        return torch.tensor(self.firsts, dtype=torch.long)

    @property
    def again(self) -> Tensor:
        """[b] int64, on the CPU: gives every row again from the different ones."""
        return torch.tensor(self.places, dtype=torch.long)
