"""Plain scores: how far prompts, answers or a stream of items lie along the vector."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from steerkit._support.progress import status
from steerkit.cli._shared import stderr
from steerkit.cli.monitor.asked import Asked
from steerkit.cli.monitor.items import Item, streamed
from steerkit.cli.monitor.summary import finish, plain, print_item

if TYPE_CHECKING:
    from steerkit.monitor.monitor import Monitor

__all__ = ["score", "score_stream"]

_HEATED = 20
_AT_ONCE = 8  # batches that are read together: texts of like length share one


def score(asked: Asked, rows: Iterable[Item], *, raw: bool, heat: Path | None, is_data: bool) -> None:
    """Score items, and show or write them.

    Args:
        asked: the call.
        rows: the items, which can be gone through again.
        raw: leave prompts as they are, without the chat template.
        heat: where a picture of every token goes, if anywhere.
        is_data: the items come from a file, not from the command line.

    Raises:
        DataError: no item has what is to be read.
    """
    monitor, name = _monitor(asked), asked.column or "projection"
    with status("reading") as say:
        scored = _scored(asked, monitor, rows, name, raw, say)
        finish(scored, name, asked.unit, out=asked.out, as_json=asked.as_json, is_data=is_data, needs_some=True)
    if heat is not None:
        _draw(asked, monitor, rows, heat, raw)


def _scored(
    asked: Asked, monitor: Monitor, rows: Iterable[Item], name: str, raw: bool, say: Callable[[str], None]
) -> Iterator[Item]:
    """The items with their new column, some hundred at a time: of a long file never more are in memory."""
    left, done = iter(rows), 0
    while some := list(itertools.islice(left, _AT_ONCE * asked.options["batch_size"])):
        values = plain(monitor.score(asked.texts(some, raw=raw)))
        yield from ({**row, name: value} for row, value in zip(some, values, strict=True))
        done += len(some)
        say(f"reading: {done} items")


def score_stream(asked: Asked, *, raw: bool) -> None:
    """Score the items of stdin as they come, and answer each with a line: itself, or what is wrong with it.

    Args:
        asked: the call.
        raw: leave prompts as they are, without the chat template.
    """
    from steerkit.errors import DataError

    monitor, name = _monitor(asked), asked.column or "projection"

    def read(items: list[Item]) -> list[Item]:
        if asked.column is not None and any(asked.column in item for item in items):
            raise DataError(f"the item has a key {asked.column!r}; give another --column")
        values = plain(monitor.score(asked.texts(items, raw=raw)))
        return [{**item, name: value} for item, value in zip(items, values, strict=True)]

    for answer in streamed(read, asked.options["batch_size"]):
        print_item(answer)
        sys.stdout.flush()


def _monitor(asked: Asked) -> Monitor:
    import steerkit

    return steerkit.Monitor(asked.model, asked.tokenizer, asked.vector, read=asked.read, **asked.options)


def _draw(asked: Asked, monitor: Monitor, rows: Iterable[Item], path: Path, raw: bool) -> None:
    """The heat map of the first items."""
    from steerkit.report.heat_page import write_heat

    first = list(itertools.islice(rows, _HEATED + 1))
    texts = [monitor.heat(one) for one in asked.texts(first[:_HEATED], raw=raw)]
    write_heat(texts, path, title=f"{asked.vector.method} at {monitor.sites[0]}", middle=monitor.middle())
    left = f" (the first {_HEATED} items)" if len(first) > _HEATED else ""
    stderr().print(f"wrote {path}{left}")
