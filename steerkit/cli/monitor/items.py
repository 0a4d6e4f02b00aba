"""The items that `steerkit monitor` reads: prompts of the command line, a file, or stdin line by line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from steerkit.prompts.files.columns import Columns

__all__ = ["KEYS", "Item", "check_column", "items_of", "prompts_of", "streamed"]

Item = dict[str, Any]

KEYS = ("prompt", "system", "response", "messages", "own_response")
"""What an item may say; a new column has another name."""


def check_column(column: str | None, rows: Sequence[Item]) -> None:
    """Refuse a new column that the items have already.

    Args:
        column: its name; None is the default one.
        rows: the items.

    Raises:
        BadParameter: an item has a key of that name.
    """
    if column is not None and any(column in row for row in rows):
        raise typer.BadParameter(f"--column {column}: items have a key of that name; give another one")


def prompts_of(prompts: Sequence[str]) -> list[Item]:
    """Prompts of the command line as items.

    Args:
        prompts: plain texts.
    """
    return [{"prompt": prompt} for prompt in prompts]


def items_of(data: str, columns: Columns) -> tuple[list[Item], bool]:
    """The items of a file of any format.

    Args:
        data: the file.
        columns: names of columns that are not the usual ones.

    Returns:
        The items, and whether they are rows of a table.

    Raises:
        DataError: the file cannot be read or holds nothing, or, with its place, a row is no item.
    """
    from steerkit.errors import DataError
    from steerkit.prompts.files.reading import read_rows
    from steerkit.prompts.files.telling import tell_of_tools

    rows = read_rows(data, columns, what="items")
    found = rows.each(lambda value: _item(value, columns, is_table=rows.is_table))
    if not found:
        raise DataError(f"{rows.name}: the file holds no item; write one JSON object a line")
    tell_of_tools(rows)
    return found, rows.is_table


def streamed(read: Callable[[Item], Item]) -> Iterator[Item]:
    """Answer the lines of stdin, one at a time, as soon as they are there.

    Args:
        read: makes the answer to an item.

    Yields:
        The answer to each line that is not blank: what `read` makes of it, or its number (and `id`) with what is wrong.
    """
    from steerkit.errors import SteerError

    for number, line in enumerate(getattr(sys.stdin, "buffer", sys.stdin), start=1):
        if not line.strip():
            continue
        value: Any = None
        try:
            value = _parsed(line)
            answer = read(_as_item(value))
        except SteerError as error:
            known = {"id": value["id"]} if isinstance(value, dict) and "id" in value else {}
            answer = {**known, "line": number, "error": str(error)}
        yield answer


def _parsed(line: bytes | str) -> Any:
    """The JSON value of a line.

    Raises:
        DataError: it is none.
    """
    from steerkit.errors import DataError
    from steerkit.prompts.files.json_rows import json_value

    try:
        text = line if isinstance(line, str) else line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} is not UTF-8") from None
    return json_value(text.strip())


def _as_item(value: Any) -> Item:
    """A row as an object.

    Args:
        value: a prompt, a chat, or an object.
    """
    return value if isinstance(value, dict) else {"prompt" if isinstance(value, str) else "messages": value}


def _item(value: Any, columns: Columns, *, is_table: bool = False) -> Item:
    """A row as an item; what it says besides stays.

    Raises:
        DataError: it is no item.
    """
    from steerkit.monitor.items import conversation_of

    item = _as_item(value)
    conversation_of(item, columns, is_table=is_table)
    return {**item, **{key: _number(item[key]) for key in ("score", "label") if key in item}} if is_table else item


def _number(text: Any) -> Any:
    """A cell of text as the number or truth that it is; anything else as it is."""
    if not isinstance(text, str):
        return text
    try:
        return {"true": True, "false": False, "": None}[text.strip().casefold()]
    except KeyError:
        try:
            return float(text)
        except ValueError:
            return text
