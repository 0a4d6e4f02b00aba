"""What the commands share: options, consoles, JSON, and how a vector's sites are shown."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from steerkit.cli._model import ModelChoice
    from steerkit.export.verification import Verification

__all__ = [
    "BatchSize",
    "Json",
    "ReadoutOption",
    "Unit",
    "comparison",
    "number",
    "print_json",
    "readout_of",
    "sites_table",
    "stderr",
    "stdout",
    "table",
    "usage_line",
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ReadoutOption = Annotated[
    str | None,
    typer.Option(
        help="Tokens read: last, mean, response_mean, answer_mean, an index; max for mean takes the largest values; of "
        "a mean without massive tokens: mean,no_massive_tokens. (default: the method's)"
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per pass.")]


class Unit(StrEnum):
    """What a strength counts in."""

    paper = "paper"
    norm = "norm"


def stdout() -> Console:
    """The console for results. Text of models and users is never read as markup."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False)


def stderr() -> Console:
    """The console for progress; anything transient shows on terminals only."""
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def readout_of(text: str | None) -> str | int | None:
    """A readout as the command line names it; an index is a number."""
    try:
        return int(text or "")
    except ValueError:
        return text


def print_json(data: Any) -> None:
    """Print an answer as JSON."""
    is_unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    typer.echo(json.dumps(data, indent=2, ensure_ascii=not is_unicode))


def table(*columns: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    """An empty table with a line under its header; columns named in `right` hold numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left")
    return made


def number(value: Any, form: str = ".3g") -> str:
    """A number for people; a dash where there is none."""
    return format(value, form) if isinstance(value, int | float) else "-"


def sites_table(described: Mapping[str, Any]) -> Table:
    """The sites of a vector: norms, strength in both units, separation on held-out items."""
    columns = (
        "site",
        "direction\nnorm",
        "activation\nspread" if any(site["spread"] for site in described["sites"]) else "activation\nnorm",
        "strength\npaper",
        "strength\nnorm",
        "held-out\nAUC",
        "\nd",
    )
    made = table(*columns, right=columns[1:])
    made.columns[0].no_wrap = True
    measured = (described["held_out"] or {}).get("sites", {})
    for site in described["sites"]:
        separation = measured.get(site["site"], {})
        made.add_row(
            site["site"],
            number(site["direction_norm"]),
            number(site["activation_norm"] if site["spread"] is None else site["spread"]),
            number(site["strength"]["paper"]),
            number(site["strength"]["norm"]),
            number(separation.get("auc"), ".3f"),
            number(separation.get("cohens_d"), ".2f"),
        )
    return made


def comparison(verification: Verification | None) -> dict[str, Any]:
    """What a comparison with the hooks says, as rows of a table and entries of JSON."""
    if verification is None:
        return {"compared": "no, as asked (--no-verify)"}
    facts = {
        "precision": verification.dtype,
        "largest_difference": verification.absolute,
        "relative": verification.relative,
    }
    if verification.is_full:
        facts |= {"one_rounding": verification.rounding}
    else:
        facts |= {"relative_at_the_median_token": verification.typical, "one_rounding_there": verification.rounding}
    return {
        **facts,
        "same_likeliest_token": f"{verification.agree} of {verification.tokens}",
        "effect": verification.effect,
    }


def usage_line(
    prompt: str, vector: str, *, strength: float | None = None, model: ModelChoice, command: str = "generate"
) -> str:
    """A command that uses a vector, to be copied into a shell."""
    is_plain = not set(prompt) & set('"$`\\!')
    quoted = f'"{prompt}"' if is_plain else shlex.quote(prompt)
    words = [f"steerkit {command}", quoted, "--vector", shlex.quote(vector)]
    if strength is not None:
        words += ["--strength", f"{strength:g}"]
    return " ".join([*words, *map(shlex.quote, model.words())])
