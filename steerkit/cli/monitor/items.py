"""The items that `steerkit monitor` reads: prompts of the command line, a JSONL file, or stdin line by line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

__all__ = ["KEYS", "Item", "check_column", "items_of", "prompts_of"]

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


def prompts_of(prompts: Sequence[str]) -> Iterator[Item]:
    """Prompts of the command line as items.

    Args:
        prompts: plain texts.

    Yields:
        One item each.
    """
    for prompt in prompts:
        yield {"prompt": prompt}


def items_of(data: str) -> Iterator[Item]:
    """The items of a JSONL file or of stdin, one at a time.

    Args:
        data: the file; - reads stdin.

    Yields:
        One item a line.

    Raises:
        DataError: the file is missing, empty or no UTF-8, or, with the line's number, a line is no item.
    """
    from steerkit.errors import DataError

    if data == "-":
        try:
            yield from _parsed("stdin", sys.stdin)
        except UnicodeDecodeError as error:
            raise DataError(f"stdin: it is not {error.encoding.upper()}; give one JSON object a line") from None
        return
    try:
        content = Path(data).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"{data}: cannot read the file ({reason}); give a JSONL file") from None
    rows = list(_parsed(data, content.split("\n")))
    if not rows:
        raise DataError(f"{data}: the file holds no item; write one JSON object a line")
    yield from rows


def _parsed(name: str, lines: Iterable[str]) -> Iterator[Item]:
    from steerkit.errors import DataError
    from steerkit.monitor.items import conversation_of

    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            row = item if isinstance(item, dict) else {"prompt" if isinstance(item, str) else "messages": item}
            conversation_of(row)
        except DataError as error:
            raise DataError(f"{name}, line {place}: {error}") from None
        except (ValueError, RecursionError):
            raise DataError(f"{name}, line {place}: malformed JSON; write one object a line") from None
        yield row
