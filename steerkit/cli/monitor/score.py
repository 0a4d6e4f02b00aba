"""Plain scores: how far prompts, answers or a stream of items lie along the vector."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from steerkit._support.progress import status
from steerkit.cli._shared import stderr
from steerkit.cli.monitor.asked import Asked
from steerkit.cli.monitor.items import Item, streamed
from steerkit.cli.monitor.summary import check_read, finish, plain, print_item

if TYPE_CHECKING:
    from steerkit.monitor.monitor import Monitor

__all__ = ["score", "score_stream"]

_HEATED = 20


def score(asked: Asked, rows: list[Item], *, raw: bool, heat: Path | None, is_data: bool) -> None:
    """Score items, and show or write them.

    Args:
        asked: the call.
        rows: the items.
        raw: leave prompts as they are, without the chat template.
        heat: where a picture of every token goes, if anywhere.
        is_data: the items come from a file, not from the command line.

    Raises:
        DataError: no item has what is to be read.
    """
    monitor = _monitor(asked)
    with status("reading"):
        values = plain(monitor.score(asked.texts(rows, raw=raw)))
    check_read(values)
    if heat is not None:
        _draw(asked, monitor, rows, heat, raw)
    name = asked.column or "projection"
    rows = [{**row, name: value} for row, value in zip(rows, values, strict=True)]
    finish(rows, name, asked.unit, out=asked.out, as_json=asked.as_json, is_data=is_data)


def score_stream(asked: Asked, *, raw: bool) -> None:
    """Score the items of stdin one by one as they come, and answer each with a line: itself, or what is wrong with it.

    Args:
        asked: the call.
        raw: leave prompts as they are, without the chat template.
    """
    from steerkit.errors import DataError

    monitor = _monitor(asked)

    def read(item: Item) -> Item:
        if asked.column in item:
            raise DataError(f"the item has a key {asked.column!r}; give another --column")
        (value,) = plain(monitor.score(asked.texts([item], raw=raw)))
        return {**item, asked.column or "projection": value}

    for answer in streamed(read):
        print_item(answer)
        sys.stdout.flush()


def _monitor(asked: Asked) -> Monitor:
    import steerkit

    return steerkit.Monitor(asked.model, asked.tokenizer, asked.vector, read=asked.read, **asked.options)


def _draw(asked: Asked, monitor: Monitor, rows: list[Item], path: Path, raw: bool) -> None:
    """The heat map of the first items."""
    from steerkit.report.heat_page import write_heat

    texts = [monitor.heat(one) for one in asked.texts(rows[:_HEATED], raw=raw)]
    write_heat(texts, path, title=f"{asked.vector.method} at {monitor.sites[0]}", middle=monitor.middle())
    left = f" (the first {_HEATED} of {len(rows)} items)" if len(rows) > _HEATED else ""
    stderr().print(f"wrote {path}{left}")
