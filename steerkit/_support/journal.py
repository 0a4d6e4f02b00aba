"""`Journal`: a JSONL file that grows by batches of rows, from which a killed run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerkit._support.files import append
from steerkit._support.processes import from_first, is_first
from steerkit.errors import DataError

__all__ = ["Journal"]


class Journal:
    """A JSONL file that grows by whole batches of rows and survives being killed between and within them.

    Its first line says what the rows depend on: a file that was begun otherwise is not continued. A last line that a
    kill left torn is dropped.

    Args:
        path: the file; it is made, with its folder, by the first `append`.
        header: what the rows depend on, as JSON holds it.

    Raises:
        DataError: the file was begun with another header, cannot be read, or has a line that is no row.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self._header: dict[str, Any] = json.loads(json.dumps(header))
        self._rows: list[dict[str, Any]] = []
        self._ends: list[int] = []
        self._start = 0
        content = from_first(self._content)  # another process may have added to it by now
        if content is not None:
            self._read(content)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        """The rows that are on the disk, in order."""
        return tuple(self._rows)

    def keep(self, count: int) -> None:
        """Drop what stands behind the first rows.

        Args:
            count: rows that stay.

        Raises:
            DataError: the file cannot be written.
        """
        if count >= len(self._rows):
            return
        self._rows, self._ends = self._rows[:count], self._ends[:count]
        self._cut()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a batch of rows, on the disk before this returns.

        Args:
            rows: what JSON can hold.

        Raises:
            DataError: the file cannot be written.
        """
        lines = [_line(row) for row in rows]
        opening = b"" if self._start else _line(self._header)
        try:
            append(self.path, b"".join([opening, *lines]))
        except OSError as error:
            raise self._unwritable(error) from None
        self._start = self._start or len(opening)
        for row, line in zip(rows, lines, strict=True):
            self._ends.append((self._ends[-1] if self._ends else self._start) + len(line))
            self._rows.append(dict(row))

    def _content(self) -> bytes | None:
        """What is on the disk; None where there is no file."""
        try:
            return self.path.read_bytes() if self.path.exists() else None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}); choose another folder") from None

    def _read(self, content: bytes) -> None:
        """Take the rows of a file; a last line without an end was torn when its writer died, and is left out."""
        *lines, torn = content.split(b"\n")
        place = 0
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(type(row).__name__)
            except (ValueError, RecursionError):
                raise DataError(f"{self.path}, line {number}: no row; delete the file to begin anew") from None
            place += len(line) + 1
            if number == 1:
                self._check(row)
                self._start = place
            else:
                self._rows.append(row)
                self._ends.append(place)
        if torn:
            self._cut()

    def _check(self, found: Mapping[str, Any]) -> None:
        """Refuse a file that was begun with another header."""
        for key in {**self._header, **found}:
            before, now = found.get(key), self._header.get(key)
            if before != now:
                shown = (f" {_short(before)}", f" {_short(now)}")
                raise DataError(
                    f"{self.path}: was begun with {key}{shown[0]}, now it is{shown[1]}; "
                    "give the same again, or choose another folder"
                )

    def _cut(self) -> None:
        """Shorten the file to the rows that are kept."""
        if not is_first():
            return
        try:
            with self.path.open("r+b") as handle:
                handle.truncate(self._ends[-1] if self._ends else self._start)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"{self.path}: cannot be written ({error.strerror}); choose another folder")


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
