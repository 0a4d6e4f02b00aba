"""`--tuning-contribution`: how much of what a prompt's end is made of comes from finetuning, by prompt and by block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from steerkit._support.progress import status
from steerkit.cli._shared import number, print_json, stdout, table
from steerkit.cli.monitor.items import Item
from steerkit.cli.monitor.shift import before_and_after
from steerkit.cli.monitor.summary import Tally, ends, plain, write

if TYPE_CHECKING:
    from steerkit.cli._model import ModelChoice
    from steerkit.prompts.files.columns import Columns

__all__ = ["COLUMN", "Tuning", "check_tuning"]

COLUMN = "tuning_contribution"


_OTHERS = ("--vector", "--read", "--uncalibrated", "--difference", "--cheap", "--heat", "--max-new-tokens")


def check_tuning(after: str | None, given: list[Any]) -> None:
    """Refuse what belongs to other readings.

    Args:
        after: the finetuned model, or None.
        given: what the command line says of the options of other readings, in the order of `_OTHERS`.

    Raises:
        BadParameter: the finetuned model is missing, or an option has no meaning here.
    """
    if after is None:
        raise typer.BadParameter("--tuning-contribution needs the finetuned model or adapter too: give it with --after")
    for option, value in zip(_OTHERS, given, strict=True):
        if value:
            raise typer.BadParameter(f"--tuning-contribution reads no vector and only prompts; leave out {option}")


@dataclass(frozen=True)
class Tuning:
    """One call.

    Attributes:
        choice: the model before finetuning.
        after: the finetuned model, or the folder of an adapter.
        options: keyword arguments of `contribution`.
        columns: names of columns that are not the usual ones.
        is_table: items are rows of a table.
        is_data: they come from a file.
        column: name of the new column; None is `COLUMN`.
        out: where the items go; None writes none.
        as_json: print one JSON object.
    """

    choice: ModelChoice
    after: str
    options: dict[str, Any]
    columns: Columns
    is_table: bool
    is_data: bool
    column: str | None
    out: Path | None
    as_json: bool

    def show(self, items: Iterable[Item], *, raw: bool) -> None:
        """Measure the prompts and show what finetuning contributes to them.

        Args:
            items: the items.
            raw: leave prompts as they are, without the chat template.
        """
        from steerkit import tuning
        from steerkit.monitor.items import conversation_of

        rows = list(items)
        texts = [conversation_of(row, self.columns, raw=raw, is_table=self.is_table) for row in rows]
        loaded, tokenizer = self.choice.load()
        base, tuned = before_and_after(loaded, self.choice, self.after)
        with status("reading"):
            found = tuning.contribution(tuned, base, tokenizer, texts, **self.options)
        name = self.column or COLUMN
        tally = Tally(name)
        values = plain(found.values)
        listed = [tally.noted({**row, name: value}) for row, value in zip(rows, values, strict=True)]
        write(listed, self.out)
        summary = {
            **tally.summary("share, L1 norm"),
            "after": self.after,
            "l2": float(found.l2.mean()),
            "without_massive": float(found.without_massive.mean()),
            "massive": {str(place): share for place, share in found.massive.items()},
            "profile": plain(found.profile),
        }
        if self.as_json:
            print_json({"items": listed, "summary": summary})
            return
        self._print(listed, name, summary)

    def _print(self, rows: list[Item], name: str, summary: dict[str, Any]) -> None:
        """Prompts of the command line one by one, then the mean, then where finetuning acts."""
        console = stdout()
        if not self.is_data:
            shown = table("prompt", name, right=(name,))
            for row in rows:
                shown.add_row(str(row["prompt"]), number(row[name], ".3f"))
            console.print(shown)
        mean = summary["mean"]
        console.print(f"{name}: mean {number(mean['mean'], '.3f')} ({ends(mean)}) over {len(rows)} prompts")
        for key in ("correlation_with_score", "auc_of_label"):
            one = summary.get(key)
            if one is not None:
                console.print(f"{key.replace('_', ' ')}: {number(one['mean'], '+.3f')} ({ends(one)})")
        without = f", without massive dimensions {summary['without_massive']:.3f}" if summary["massive"] else ""
        console.print(f"by the L2 norm {summary['l2']:.3f}{without}")
        profile = table("block", "share of finetuning", right=("block", "share of finetuning"))
        for block, share in enumerate(summary["profile"]):
            profile.add_row(str(block), number(share, ".3f"))
        console.print(profile)
        if self.out is not None:
            console.print(f"wrote {self.out}")
