"""The items that `steerkit monitor` reads: prompts of the command line, a file, or stdin line by line."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from steerkit.prompts.files.columns import Columns
    from steerkit.prompts.files.lines import Lines
    from steerkit.prompts.files.rows import Row

__all__ = ["KEYS", "FileItems", "Item", "check_column", "items_of", "prompts_of", "streamed"]

Item = dict[str, Any]

KEYS = ("prompt", "system", "response", "messages", "own_response")
"""What an item may say; a new column has another name."""


def check_column(column: str | None, rows: Iterable[Item]) -> None:
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


@dataclass(frozen=True)
class FileItems:
    """The items of a JSONL file, read anew each time they are gone through, so that none has to be kept.

    Attributes:
        lines: of the file.
        columns: names of columns that are not the usual ones.
    """

    lines: Lines
    columns: Columns

    def __iter__(self) -> Iterator[Item]:
        for row in self.lines:
            yield _item(row.value, f"{self.lines.name}, {row.place}", self.columns)


def items_of(data: str, columns: Columns, column: str | None = None) -> tuple[Iterable[Item], bool]:
    """The items of a file of any format, all of which have been looked at.

    Args:
        data: the file.
        columns: names of columns that are not the usual ones.
        column: name of the new column; None is the default one.

    Returns:
        The items, which can be gone through again, and whether they are rows of a table.

    Raises:
        DataError: the file cannot be read or holds nothing, or, with its place, a row is no item.
        BadParameter: an item has a key of the new column's name.
    """
    from steerkit.errors import DataError
    from steerkit.prompts.files.lines import lines_of
    from steerkit.prompts.files.reading import read_rows
    from steerkit.prompts.files.telling import tell_of_tools

    lines = lines_of(data, columns)
    if lines is not None:
        tell_of_tools(lines.name, _looked_at(lines, columns, column))
        return FileItems(lines, columns), False
    rows = read_rows(data, columns, what="items")
    placed = zip(rows.rows, rows.places, strict=True)
    found = [_item(row.value, place, columns, is_table=rows.is_table) for row, place in placed]
    if not found:
        raise DataError(f"{rows.name}: the file holds no item; write one JSON object a line")
    check_column(column, found)
    tell_of_tools(rows.name, rows.rows)
    return found, rows.is_table


def _looked_at(lines: Lines, columns: Columns, column: str | None) -> Iterator[Row]:
    """The rows of a file, each of which is an item without the new column."""
    for row in lines:
        check_column(column, [_item(row.value, f"{lines.name}, {row.place}", columns)])
        yield row


def streamed(read: Callable[[list[Item]], list[Item]], most: int) -> Iterator[Item]:
    """Answer the lines of stdin as soon as they are there, those together that wait already.

    Args:
        read: makes the answers to some items.
        most: so many items together.

    Yields:
        The answer to each line that is not blank, in order: what `read` makes of it, or its number (and `id`) with what
        is wrong.
    """
    waiting: queue.Queue[tuple[int, bytes] | None] = queue.Queue(2 * most)

    def fetch() -> None:
        try:
            for number, line in enumerate(getattr(sys.stdin, "buffer", sys.stdin), start=1):
                if line.strip():
                    waiting.put((number, line if isinstance(line, bytes) else line.encode()))
        finally:
            waiting.put(None)

    threading.Thread(target=fetch, daemon=True).start()
    is_open = True
    while is_open:
        lines = [waiting.get()]
        while len(lines) < most and lines[-1] is not None and not waiting.empty():
            lines.append(waiting.get())
        is_open = lines[-1] is not None
        yield from _answers([line for line in lines if line is not None], read)


def _answers(lines: Sequence[tuple[int, bytes]], read: Callable[[list[Item]], list[Item]]) -> list[Item]:
    """The answers to some lines: together where all are right, else each alone."""
    from steerkit.errors import SteerError
    from steerkit.prompts.files.lines import line_value

    try:
        return read([_as_item(line_value(line)) for _, line in lines]) if lines else []
    except SteerError:
        return [_answer(*line, read) for line in lines]


def _answer(number: int, line: bytes, read: Callable[[list[Item]], list[Item]]) -> Item:
    from steerkit.errors import SteerError
    from steerkit.prompts.files.lines import line_value

    value: Any = None
    try:
        value = line_value(line)
        (answer,) = read([_as_item(value)])
        return answer
    except SteerError as error:
        known = {"id": value["id"]} if isinstance(value, dict) and "id" in value else {}
        return {**known, "line": number, "error": str(error)}


def _as_item(value: Any) -> Item:
    """A row as an object.

    Args:
        value: a prompt, a chat, or an object.
    """
    return value if isinstance(value, dict) else {"prompt" if isinstance(value, str) else "messages": value}


def _item(value: Any, place: str, columns: Columns, *, is_table: bool = False) -> Item:
    """A row as an item; what it says besides stays.

    Raises:
        DataError: it is no item, with its place.
    """
    from steerkit.monitor.items import conversation_of
    from steerkit.prompts.files.rows import item_at

    item = _as_item(value)
    with item_at(place):
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
