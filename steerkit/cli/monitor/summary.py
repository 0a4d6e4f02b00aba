"""What `steerkit monitor` says of its numbers: means with intervals, correlations, and the items with a new column."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from steerkit.cli._shared import number, print_json, stderr, stdout, table
from steerkit.cli.monitor.items import Item

if TYPE_CHECKING:
    from rich.console import Console

    from steerkit.evaluate.intervals import Estimate

__all__ = ["Tally", "ends", "estimate", "finish", "plain", "print_item", "write"]


class Tally:
    """The numbers of items that pass by, which are not kept themselves.

    Args:
        column: the name of the number.
    """

    def __init__(self, column: str) -> None:
        self.column = column
        self.values, self._scores, self._labels = array("d"), array("d"), array("b")
        self._has_scores = False

    def noted(self, row: Item) -> Item:
        """Note an item.

        Args:
            row: with its new column; `score` and `label` are noted too.

        Returns:
            The same item.
        """
        self.values.append(_number(row[self.column]))
        score, label = row.get("score"), row.get("label")
        self._scores.append(math.nan if isinstance(score, bool) else _number(score))
        self._has_scores |= isinstance(score, int | float) and not isinstance(score, bool)
        self._labels.append(int(label) if isinstance(label, int | float) and label in (0, 1) else -1)
        return row

    def check(self) -> None:
        """Refuse numbers that are none.

        Raises:
            DataError: nothing could be read.
        """
        from steerkit.errors import DataError

        if all(value != value for value in self.values):
            raise DataError(
                f"none of {len(self.values)} items has a response to read; give --data with responses, or --read "
                "prompt_last"
            )

    def summary(self, unit: str) -> dict[str, Any]:
        """Mean, spread, and how the column goes with `score` and `label` where the items bring them.

        Args:
            unit: of the numbers.
        """
        import torch

        from steerkit.evaluate.intervals import NotScored, correlation, interval, separability

        values = torch.tensor(self.values, dtype=torch.double)
        kept = values[~values.isnan()]
        found: dict[str, Any] = {"column": self.column, "unit": unit, "items": len(values), "scored": len(kept)}
        if len(kept):
            found |= {
                "mean": estimate(interval(values, shares=False)),
                "sd": float(kept.std()) if len(kept) > 1 else None,
            }
        try:
            if self._has_scores:
                scores = torch.tensor(self._scores, dtype=torch.double)
                found["correlation_with_score"] = estimate(correlation(values, scores))
        except NotScored:
            found["correlation_with_score"] = None
        labels = torch.tensor(self._labels, dtype=torch.int8)
        sides = values[labels == 1], values[labels == 0]
        if all(len(side) for side in sides):
            try:
                found["auc_of_label"] = estimate(separability(*sides))
            except NotScored:
                found["auc_of_label"] = None
        return found


def _number(value: Any) -> float:
    """A number, or not a number."""
    return float(value) if isinstance(value, int | float) else math.nan


def plain(values: Any) -> list[float | None]:
    """Numbers as JSON can hold them; null for what has none.

    Args:
        values: [n], not a number where an item has nothing to read.
    """
    return [None if value != value else round(value, 6) for value in values.tolist()]


def _line(row: Item) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)


def print_item(row: Item) -> None:
    """Print an item as a line of JSON.

    Args:
        row: the item.
    """
    is_unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    typer.echo(json.dumps(row, ensure_ascii=not is_unicode, default=str))


def estimate(found: Estimate) -> dict[str, float | None]:
    """A mean with its interval, as JSON; null for an end that is not finite.

    Args:
        found: what was measured.
    """
    parts = {name: getattr(found, name) for name in ("mean", "low", "high")}
    return {name: None if abs(value) == float("inf") else value for name, value in parts.items()}


def finish(
    rows: Iterable[Item],
    name: str,
    unit: str,
    *,
    out: Path | None,
    as_json: bool,
    is_data: bool,
    needs_some: bool = False,
) -> None:
    """Write the items as they come, and show what their new column says.

    Args:
        rows: the items, gone through once.
        name: of the new column.
        unit: of its numbers.
        out: where the items go; None prints them.
        as_json: print one JSON object.
        is_data: the items come from a file, not from the command line.
        needs_some: refuse items none of which could be read; nothing is written then.

    Raises:
        DataError: see `needs_some`.
    """
    tally = Tally(name)
    noted: Iterator[Item] = map(tally.noted, rows)
    kept: list[Item] = []
    if as_json or not is_data:
        noted = iter(kept := list(noted))
    with _written(out) as write_line:
        for row in noted:
            write_line(row)
            if out is None and is_data and not as_json:
                print_item(row)
        if needs_some:
            tally.check()
    summary = tally.summary(unit)
    if as_json:
        print_json({"items": kept, "summary": summary})
    elif not is_data:
        shown = table("prompt", name, right=(name,))
        for row in kept:
            shown.add_row(str(row["prompt"]), number(row[name], "+.3f"))
        stdout().print(shown)
        stdout().print(f"in {summary['unit']}")
    else:
        _print_summary(stdout() if out is not None else stderr(), summary)
        if out is not None:
            stdout().print(f"wrote {out}")


def write(rows: Iterable[Item], out: Path | None) -> None:
    """Write items as JSONL.

    Args:
        rows: the items.
        out: the file; None writes none.
    """
    with _written(out) as write_line:
        for row in rows:
            write_line(row)


@contextlib.contextmanager
def _written(out: Path | None) -> Iterator[Callable[[Item], object]]:
    """What writes an item into a file, which is there when the block ends well; without a file nothing is."""
    if out is None:
        yield lambda _row: None
        return
    from steerkit._support.files import whole_file

    with whole_file(out) as handle:
        yield lambda row: handle.write(f"{_line(row)}\n".encode())


def _print_summary(console: Console, summary: dict[str, Any]) -> None:
    shown = table("", "mean", "95 % interval", right=("mean",))
    titles = {
        "mean": f"{summary['column']} ({summary['unit']})",
        "correlation_with_score": "correlation with score",
        "auc_of_label": "AUC of label",
    }
    for key, title in titles.items():
        one = summary.get(key)
        if one is not None:
            shown.add_row(title, number(one["mean"], "+.3f"), ends(one))
    console.print(shown)
    console.print(f"{summary['scored']} of {summary['items']} items could be read")


def ends(one: dict[str, Any]) -> str:
    """The ends of an interval in words.

    Args:
        one: what `estimate` gives.
    """
    return f"{number(one['low'], '+.3f')} to {number(one['high'], '+.3f')}"
