"""What `steerkit monitor` says of its numbers: means with intervals, correlations, and the items with a new column."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from steerkit.cli._shared import number, print_json, stderr, stdout, table
from steerkit.cli.monitor.items import Item

if TYPE_CHECKING:
    from rich.console import Console

    from steerkit.evaluate.intervals import Estimate

__all__ = ["check_read", "ends", "estimate", "finish", "plain", "print_item", "write"]


def check_read(values: Sequence[float | None]) -> None:
    """Refuse numbers that are none.

    Args:
        values: of each item; None where it has nothing to read.

    Raises:
        DataError: nothing could be read.
    """
    from steerkit.errors import DataError

    if all(value is None for value in values):
        raise DataError(
            f"none of {len(values)} items has a response to read; give --data with responses, or --read prompt_last"
        )


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


def _summary(rows: Sequence[Item], name: str, unit: str) -> dict[str, Any]:
    """Mean, spread, and how the column goes with `score` and `label` where the items bring them."""
    import torch

    from steerkit.evaluate.intervals import NotScored, correlation, interval, separability

    def numbers(values: Iterable[Any]) -> Any:
        listed = [float(one) if isinstance(one, int | float) else float("nan") for one in values]
        return torch.tensor(listed, dtype=torch.double)

    values = numbers(row[name] for row in rows)
    kept = values[~values.isnan()]
    found: dict[str, Any] = {"column": name, "unit": unit, "items": len(rows), "scored": len(kept)}
    if len(kept):
        found |= {"mean": estimate(interval(values, shares=False)), "sd": float(kept.std()) if len(kept) > 1 else None}
    labels = [row.get("label") for row in rows]
    scores = [None if isinstance(row.get("score"), bool) else row.get("score") for row in rows]
    try:
        if any(isinstance(score, int | float) for score in scores):
            found["correlation_with_score"] = estimate(correlation(values, numbers(scores)))
    except NotScored:
        found["correlation_with_score"] = None
    truths = [bool(label) if isinstance(label, int | float) and label in (0, 1) else None for label in labels]
    if True in truths and False in truths:
        sides = [values[torch.tensor([truth is side for truth in truths], dtype=torch.bool)] for side in (True, False)]
        try:
            found["auc_of_label"] = estimate(separability(*sides))
        except NotScored:
            found["auc_of_label"] = None
    return found


def estimate(found: Estimate) -> dict[str, float | None]:
    """A mean with its interval, as JSON; null for an end that is not finite.

    Args:
        found: what was measured.
    """
    parts = {name: getattr(found, name) for name in ("mean", "low", "high")}
    return {name: None if abs(value) == float("inf") else value for name, value in parts.items()}


def finish(rows: list[Item], name: str, unit: str, *, out: Path | None, as_json: bool, is_data: bool) -> None:
    """Write the items, and show what their new column says.

    Args:
        rows: the items.
        name: of the new column.
        unit: of its numbers.
        out: where the items go; None prints them.
        as_json: print one JSON object.
        is_data: the items come from a file, not from the command line.
    """
    summary = _summary(rows, name, unit)
    write(rows, out)
    if as_json:
        print_json({"items": rows, "summary": summary})
        return
    if not is_data:
        shown = table("prompt", name, right=(name,))
        for row in rows:
            shown.add_row(str(row["prompt"]), number(row[name], "+.3f"))
        stdout().print(shown)
        stdout().print(f"in {summary['unit']}")
        return
    if out is None:
        for row in rows:
            print_item(row)
    _print_summary(stdout() if out is not None else stderr(), summary)
    if out is not None:
        stdout().print(f"wrote {out}")


def write(rows: Sequence[Item], out: Path | None) -> None:
    """Write items as JSONL.

    Args:
        rows: the items.
        out: the file; None writes none.
    """
    if out is not None:
        from steerkit._support.files import write_whole

        write_whole(out, "".join(_line(row) + "\n" for row in rows).encode())


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
