"""Rows of JSON: one value a line, values one after the other, or one document that holds them all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from steerkit.errors import DataError
from steerkit.prompts.files.columns import Columns
from steerkit.prompts.files.rows import Row, Rows
from steerkit.prompts.messages import is_chat

__all__ = ["is_document", "is_meant_as_lines", "json_rows", "json_value"]

_LINES = (".jsonl", ".ndjson")
_ENDINGS = (*_LINES, ".json")
_BEGINNING = re.compile(r'\s*(\[\s*(\Z|[\[{"])|\{\s*(\Z|["}]))')
_SPACE = re.compile(r"[ \t\r\n]*")


def json_value(text: str) -> Any:
    """Read one JSON value.

    Args:
        text: the text.

    Raises:
        DataError: it is none, with the column.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"malformed JSON at {at}: {error.msg}; write one JSON object a line, or one list") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"JSON that Python cannot read ({error}); write one JSON object a line, or one list") from None


def json_rows(name: str, text: str, columns: Columns) -> Rows | None:
    """The rows of a text that is JSON; None where it is something else.

    A file is taken by what is in it. Its ending decides only whether a damaged one, or lines in quotation marks, are
    meant as JSON; on stdin such lines are, as `jq` writes them.

    Args:
        name: of the file.
        text: its content.
        columns: names of columns that are not the usual ones.

    Raises:
        DataError: it is meant as JSON and cannot be read, with the place.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    is_named = name.casefold().endswith(_ENDINGS)
    if not lines or not (is_named or lines[0][1].lstrip()[0] in '[{"'):
        return None
    try:
        first = json_value(lines[0][1])
    except DataError:
        return _values(name, text, lines[0][0], columns, is_named=is_named)
    if len(lines) == 1 and is_document(first, columns):
        return _document(name, first, columns)
    if not is_meant_as_lines(name, first) and not (name == "stdin" and _all_quoted(lines)):
        return None  # a text in quotation marks
    return Rows(name, "JSONL", tuple(_lines(name, lines)))


def is_meant_as_lines(name: str, first: object) -> bool:
    """Whether values on lines of their own are JSONL, not lines of text in quotation marks.

    Args:
        name: of the file; its ending says that it is.
        first: the first value.
    """
    return name.casefold().endswith(_ENDINGS) or isinstance(first, list | dict)


def _lines(name: str, lines: list[tuple[int, str]]) -> Iterator[Row]:
    for number, line in lines:
        try:
            yield Row(json_value(line), f"line {number}")
        except DataError as error:
            raise DataError(f"{name}, line {number}: {error}") from None


def _all_quoted(lines: list[tuple[int, str]]) -> bool:
    """Whether every line is a JSON string."""
    try:
        return all(isinstance(json.loads(line), str) for _, line in lines)
    except ValueError:
        return False


def _values(name: str, text: str, first: int, columns: Columns, *, is_named: bool) -> Rows | None:
    """Values that go over several lines: one document, or one after the other."""
    rows: list[Row] = []
    decoder, at = json.JSONDecoder(), _space(text, 0)
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if not (is_named or any(isinstance(row.value, dict | list) for row in rows) or _BEGINNING.match(text)):
                return None
            if name.endswith(_LINES):  # lines were meant
                list(_lines(name, [(first, text.split("\n")[first - 1])]))
            if isinstance(error, json.JSONDecodeError):
                place = f"{name}, line {error.lineno}"
                raise DataError(f"{place}: malformed JSON at column {error.colno}: {error.msg}") from None
            raise DataError(f"{name}: JSON that Python cannot read ({error})") from None
        line = text.count("\n", 0, at) + 1
        rows.append(Row(value, f"line {line}"))
        at = _space(text, end)
    if len(rows) == 1 and is_document(rows[0].value, columns):
        return _document(name, rows[0].value, columns)
    return Rows(name, "JSONL", tuple(rows))


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def is_document(value: object, columns: Columns) -> bool:
    """Whether a value holds rows and is not one itself: a list that is no chat, or an object of lists.

    Args:
        value: what JSON gave.
        columns: names of columns that are not the usual ones.
    """
    if isinstance(value, list):
        return not is_chat(value)
    if not isinstance(value, dict) or not _lists(value):
        return False
    return not columns.are_usual(value) or (_is_columnar(value) and any(value.values()))


def _lists(value: dict[str, Any]) -> dict[str, list[Any]]:
    return {key: entry for key, entry in value.items() if isinstance(entry, list) and not is_chat(entry)}


def _is_columnar(value: dict[str, Any]) -> bool:
    """Whether an object is a table of columns."""
    lists = _lists(value)
    return len(lists) == len(value) and len({len(entry) for entry in lists.values()}) == 1


def _document(name: str, value: Any, columns: Columns) -> Rows:
    """The rows inside of a document."""
    if isinstance(value, dict):
        if _is_columnar(value) and columns.are_usual(value):
            value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
        else:
            lists = _lists(value)
            if len(lists) > 1:
                raise DataError(f"{name}: the document holds the lists {', '.join(lists)}; give a file of one of them")
            (value,) = lists.values()
    return Rows(name, "JSON", tuple(Row(entry, f"item {place}") for place, entry in enumerate(value)))
