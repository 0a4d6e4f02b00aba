"""The rows of a file, each with the place where it stands in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from steerkit.errors import DataError

__all__ = ["Row", "Rows", "item_at"]

Read = TypeVar("Read")


@contextmanager
def item_at(place: str) -> Iterator[None]:
    """Put a place before the message of a DataError.

    Args:
        place: such as ``line 3``.

    Raises:
        DataError: the one raised inside, with the place before it.
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        value: a text, a chat, or an object of columns; something else is an error of the file.
        place: where it stands: ``line 3``, or ``item 2`` and ``row 2``, counted from 0 as a list is.
    """

    value: object
    place: str


@dataclass(frozen=True)
class Rows:
    """What a file holds.

    Attributes:
        name: of the file, as it was given.
        kind: what it is: JSON, JSONL, CSV, TSV, parquet, data set, text.
        rows: its rows, blank ones left out.
    """

    name: str
    kind: str
    rows: tuple[Row, ...]

    @property
    def is_table(self) -> bool:
        """Whether all rows have the same columns, so that a column may be of no use here."""
        return self.kind not in ("JSON", "JSONL", "text")

    @property
    def places(self) -> list[str]:
        """Where each row stands, with the file."""
        return [f"{self.name}, {row.place}" if self.name else row.place for row in self.rows]

    def each(self, read: Callable[[object], Read]) -> list[Read]:
        """What is made of every row; a mistake is told with the file and its place.

        Args:
            read: makes something of a row's value.
        """
        found = []
        for row, place in zip(self.rows, self.places, strict=True):
            with item_at(place):
                found.append(read(row.value))
        return found
