"""JSONL that is read line by line, as often as asked for, in memory that does not grow with the file."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerkit.errors import DataError
from steerkit.prompts.files.columns import Columns
from steerkit.prompts.files.json_rows import is_document, is_meant_as_lines, json_value
from steerkit.prompts.files.rows import Row, item_at
from steerkit.prompts.files.source import HUB, STDIN

__all__ = ["Lines", "line_value", "lines_of"]

_LONGEST = 1 << 24  # bytes of the first line: what is longer is a document in one line, or no JSONL


@dataclass(frozen=True)
class Lines:
    """The rows of a JSONL file, read anew each time they are gone through.

    Attributes:
        name: of the file, as it was given.
    """

    name: str

    def __iter__(self) -> Iterator[Row]:
        """Read the rows, blank lines left out.

        Raises:
            DataError: with its place, a line is no JSON or no UTF-8, or the file cannot be read any more.
        """
        try:
            with Path(self.name).open("rb") as handle:
                for number, line in enumerate(handle, start=1):
                    if line.strip():
                        with item_at(f"{self.name}, line {number}"):
                            value = line_value(line)
                        yield Row(value, f"line {number}")
        except OSError as error:
            raise DataError(f"{self.name}: cannot read the file ({error.strerror}); give it again") from None


def line_value(line: bytes) -> Any:
    """The value of one line; a mark of the byte order before it is left out.

    Args:
        line: of JSONL, not blank.

    Raises:
        DataError: it is no UTF-8 or no JSON, with the byte or the column.
    """
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} is not UTF-8; write the text as UTF-8") from None
    return json_value(text.strip())


def lines_of(source: str | Path, columns: Columns) -> Lines | None:
    """The lines of a file that is JSONL; None where it is something else, or may be.

    Args:
        source: a file, - for stdin, or ``hf:`` and the name of a data set.
        columns: names of columns that are not the usual ones.
    """
    name = str(source)
    if name == STDIN or name.startswith(HUB):
        return None
    try:
        with Path(name).open("rb") as handle:
            first = _filled(handle)
            is_one = not _filled(handle)
        value = line_value(first)
    except (OSError, ValueError, DataError):
        return None  # whoever reads all of it says what is wrong
    if is_one and is_document(value, columns):
        return None
    return Lines(name) if is_meant_as_lines(name, value) else None


def _filled(handle: object) -> bytes:
    """The next line that is not blank; empty at the end, and where it is too long."""
    while line := handle.readline(_LONGEST):  # type: ignore[attr-defined]
        if line.strip():
            return bytes(line) if len(line) < _LONGEST else b""
    return b""
