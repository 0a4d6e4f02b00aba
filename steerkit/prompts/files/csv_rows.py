"""Rows of CSV and TSV files. A text with commas in it is none: a header with a known column tells a table from text.

Python's own guess at a dialect is misled by quoted line breaks, so the delimiter is the one that makes a header.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator
from typing import Literal

from steerkit.errors import DataError
from steerkit.prompts.files.columns import Columns
from steerkit.prompts.files.rows import Row, Rows

__all__ = ["csv_rows"]

_DELIMITERS = (",", "\t", ";", "|")
_ENDINGS = (".csv", ".tsv")
# Where there is one column, nothing parts cells.
_NONE = "\x1f"
_NAME = re.compile(r"[^\W\d][\w.\-]*(?: [\w.\-]+){0,3}")
_LONGEST_NAME = 48

_Records = list[tuple[int, list[str]]]


def csv_rows(name: str, text: str, columns: Columns) -> Rows | None:
    """The rows of a text that is a table; None where it is something else.

    Args:
        name: of the file.
        text: its content.
        columns: names of columns that are not the usual ones.

    Returns:
        Rows as objects of text, the cells of columns; rows without any text are left out.

    Raises:
        DataError: it is a table and cannot be read, with the line.
    """
    is_named = name.casefold().endswith(_ENDINGS)
    headers = {delimiter: _header(text, delimiter) for delimiter in (*_DELIMITERS, _NONE)}
    for delimiter, header in headers.items():
        if (len(header) > 1) is (delimiter != _NONE) and columns.are_usual(header) and _is_header(header, columns):
            records = _records(name, text, delimiter, is_named=is_named)
            if records is not None:
                rows = tuple(
                    Row({key: cell for key, cell in zip(header, cells, strict=True) if key}, f"line {line}")
                    for line, cells in records[1:]
                )
                return Rows(name, "TSV" if delimiter == "\t" else "CSV", rows)
    if is_named and any(headers.values()):
        raise DataError(
            f"{name}: no usual column in its header, which has {columns.told(max(headers.values(), key=len))}; "
            "name them with --columns prompt=NAME, or positive=NAME,negative=NAME"
        )
    return None


def _header(text: str, delimiter: str) -> list[str]:
    """The cells of the first record; none where it cannot be read as one."""
    try:
        return [cell.strip() for cell in next((cells for _, cells in _read(text, delimiter)), [])]
    except csv.Error:
        return []


def _is_header(names: list[str], columns: Columns) -> bool:
    """Whether cells look like names of columns and not like the beginning of a sentence."""
    given = columns.named.values()
    looks = all(
        not name or name in given or (len(name) <= _LONGEST_NAME and _NAME.fullmatch(name) is not None)
        for name in names
    )
    return looks and len(set(names)) == len(names)


def _records(name: str, text: str, delimiter: str, *, is_named: bool) -> _Records | None:
    """All records with the lines they begin at, the header first; None where they make no table.

    Raises:
        DataError: a table cannot be read, with the line.
    """
    head = text.lstrip("\r\n").split("\n", 1)[0]
    padded = head.count(delimiter) == head.count(f"{delimiter} ")
    try:
        records = list(_read(text, delimiter, skips=padded))
    except csv.Error as error:
        # Lists of sentences and TSV are often written without any quoting.
        records = list(_read(text, delimiter, quoting=csv.QUOTE_NONE)) if delimiter in (_NONE, "\t") else []
        if not records or _ragged(records) is not None:
            raise DataError(f"{name}: has the header of a table, but cannot be read as one ({error})") from None
    wrong = _ragged(records)
    if wrong is None:
        return records
    if not is_named and _ragged(records[:2]) is not None:
        return None  # the second line has nothing of a table: sentences
    raise DataError(
        f"{name}, line {wrong[0]}: {len(wrong[1])} cells where the header has {len(records[0][1])}; "
        "put cells that hold the delimiter or a line break into quotation marks"
    )


def _read(
    text: str, delimiter: str, *, skips: bool = False, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
) -> Iterator[tuple[int, list[str]]]:
    """Records that hold any text, with the lines they begin at."""
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=skips, quoting=quoting)
    before = csv.field_size_limit(sys.maxsize)
    try:
        line = 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = reader.line_num + 1
    finally:
        csv.field_size_limit(before)


def _ragged(records: _Records) -> tuple[int, list[str]] | None:
    """The first record that has not as many cells as the header."""
    return next((one for one in records if len(one[1]) != len(records[0][1])), None)
