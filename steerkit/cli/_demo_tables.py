"""What `steerkit demo` prints: answers beside each other first, then what was measured, then the files."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from steerkit.cli._shared import sites_table, stdout, table, usage_line

if TYPE_CHECKING:
    from steerkit.cli._model import ModelChoice
    from steerkit.evaluate.by_prompt_kind import Kind
    from steerkit.evaluate.curve import Curve
    from steerkit.recipe import Recipe
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["show_answers", "show_curve", "show_files", "show_kinds"]


def show_answers(
    recipe: Recipe, model: str, vector: SteeringVector, answers: Mapping[float, Sequence[str]], *, is_shipped: bool
) -> None:
    """Print the answers to each question, a column for each strength, and the vector's sites below.

    Args:
        recipe: the recipe.
        model: the model's name.
        vector: what steered.
        answers: by strength, in the order of the recipe's questions.
        is_shipped: the vector was not fitted now.
    """
    from rich.table import Table

    from steerkit.methods._registry import method_of

    console, neutral = stdout(), method_of(vector).neutral_strength
    typer.echo(f"{recipe.name} on {model}: {recipe.title or recipe.behaviour}")
    typer.echo("steered with the vector that is shipped" if is_shipped else "steered with a vector fitted just now")
    for number, question in enumerate(recipe.evaluate.questions):
        shown = Table(expand=True, title=question, title_justify="left", title_style="bold")
        for strength in answers:
            shown.add_column("unsteered" if strength == neutral else f"strength {_signed(strength)}", ratio=1)
        shown.add_row(*(" ".join(texts[number].split()) for texts in answers.values()))
        console.print(shown)
    console.print(sites_table(vector.describe()))
    sys.stdout.flush()


def show_curve(curve: Curve, held_out: int) -> None:
    """Print the margins as a table, and what they say in one line.

    Args:
        curve: what was measured.
        held_out: how many items there are.
    """
    randoms = f"{len(curve.controls)} random directions"
    columns = ("strength", "margin", "95 % interval", randoms)
    items = curve.items if curve.items == held_out else f"{curve.items} of {held_out}"
    shown = table(*columns, right=columns, title=f"Preference margin, {items} held-out items, nats per token")
    for row in curve.as_rows():
        beside = _span(min(row["random"]), max(row["random"])) if row["random"] else "-"
        shown.add_row(_signed(row["strength"]), f"{row['effect']:+.3f}", _span(row["low"], row["high"]), beside)
    stdout().print(shown)
    rises, clear = ("yes" if found else "no" for found in (curve.rises, curve.clear_of_controls))
    typer.echo(f"rises over the whole range: {rises}; outer intervals clear of random directions: {clear}")


def show_kinds(kinds: Sequence[Kind], recipe: Recipe) -> None:
    """Print what each kind of prompts got, as a table, and how well refusals are counted.

    Args:
        kinds: what was measured.
        recipe: the recipe, which names them.
    """
    from steerkit.evaluate.scorers.refusal import stated_accuracy

    columns = ("prompts", "", "refused before", "refused", "unchanged")
    shown = table(*columns, right=columns[1:], title=f"Answers at strength {kinds[0].strength:g}, percent")
    names = {"positive": recipe.data.positive or "", "negative": recipe.data.negative or f"not {recipe.data.positive}"}
    for kind in kinds:
        shares = [
            f"{100 * share.mean:.0f} ({100 * share.low:.0f} to {100 * share.high:.0f})"
            for share in (kind.before, kind.refused, kind.unchanged)
        ]
        shown.add_row(names.get(kind.side, f"{names['negative']}, {kind.side}"), str(kind.items), *shares)
    stdout().print(shown)
    stdout().print(f"refusals are counted by wording: {stated_accuracy()}", highlight=False)


def show_files(
    recipe: Recipe,
    model: ModelChoice,
    file: Path,
    strength: float,
    picture: Path | None,
    *,
    is_drawn: bool,
    is_full: bool,
) -> None:
    """Print what was written, and what to try next.

    Args:
        recipe: the recipe.
        model: which model, and how it is loaded.
        file: of the vector.
        strength: the one to try.
        picture: of the curve, if there is one.
        is_drawn: whether there is a curve to draw.
        is_full: everything was fitted and measured.
    """
    typer.echo(f"wrote {file} and {file.with_suffix('.md').name}")
    if picture is not None:
        typer.echo(f"picture: {picture}")
    elif is_drawn:
        typer.echo("no picture: matplotlib is missing; pip install 'steerkit-hf[plots]'")
    typer.echo("try next:")
    typer.echo(f"  {usage_line(recipe.evaluate.questions[0], str(file), strength=strength, model=model)}")
    if not is_full:
        typer.echo(f"  steerkit demo --recipe {shlex.quote(recipe.name)} --full")
    typer.echo(f"  steerkit inspect {shlex.quote(str(file))}")
    typer.echo("  steerkit recipes")


def _span(low: float, high: float) -> str:
    return f"{low:+.2f} .. {high:+.2f}"


def _signed(strength: float) -> str:
    return f"{strength:+g}" if strength else "0"
