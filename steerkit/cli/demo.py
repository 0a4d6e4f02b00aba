"""`steerkit demo`: the main job in one go. Fit, look at the answers, measure what changed."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit.cli._files import check_writable
from steerkit.cli._shared import (
    BatchSize,
    Json,
    RecipeModel,
    print_json,
    sites_table,
    stderr,
    stdout,
    table,
    usage_line,
)

if TYPE_CHECKING:
    from rich.console import Console

    from steerkit.evaluate.by_prompt_kind import Kind
    from steerkit.evaluate.curve import Curve
    from steerkit.recipe import Recipe
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]

CONTROLS = 5
KIND = 60
MAX_NEW_TOKENS = 40


def run(
    recipe: Annotated[str, typer.Option(help="A recipe's name, behaviour or file.")] = "optimism",
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the vector and the picture go.")] = Path("out"),
    model: RecipeModel = None,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Do the main job in one go: fit a recipe's vector, steer both ways, measure the effect, draw it.

    Of a recipe of two kinds of prompts, answers of either kind are counted: how many refuse, how many stay as they
    were. Writes <out>/<recipe>.safetensors, its card <out>/<recipe>.md and, of a curve, <out>/<recipe>.png.
    """
    import steerkit
    from steerkit.evaluate.by_prompt_kind import by_kind
    from steerkit.evaluate.curve import strength_response
    from steerkit.evaluate.setup import Setup
    from steerkit.recipe import find_recipe

    chosen = find_recipe(recipe)
    target = out / f"{chosen.name}.safetensors"
    _, held_out = chosen.split()
    check_writable(target)
    name = model or chosen.model.name
    loaded, tokenizer = steerkit.load_model(name)
    vector = chosen.extract(loaded, tokenizer, batch_size=batch_size, progress=stderr().is_terminal)
    vector.save(target)

    questions, strengths = chosen.evaluate.questions, chosen.evaluate.strengths
    sorts = chosen.data.positive is not None
    doses = (0.0, chosen.apply.strength) if sorts else (-chosen.apply.strength, 0.0, chosen.apply.strength)
    answers: dict[float, list[str]] = {}
    curve: Curve | None = None
    kinds: Sequence[Kind] = ()
    with _progress(len(doses) + (2 if sorts else len(strengths) * (1 + CONTROLS))) as step:
        for dose in doses:
            answers[dose] = steerkit.generate(
                loaded, tokenizer, questions, vector=vector, strength=dose, max_new_tokens=MAX_NEW_TOKENS
            )
            step()
        setup = Setup(loaded, tokenizer, held_out, batch_size=batch_size)
        if sorts:
            setup = replace(setup, texts=KIND, max_new_tokens=MAX_NEW_TOKENS)
            kinds = by_kind(setup, vector, chosen.apply.strength, step=step)
        else:
            curve = strength_response(setup, vector, strengths, controls=CONTROLS, step=step)
    card = _write_card(target.with_suffix(".md"), vector, curve, kinds, answers, questions)
    picture = None if curve is None else _draw(curve, target.with_suffix(".png"), chosen, vector)
    found = _Findings(chosen, name, target, vector, answers, curve, kinds, card, picture)
    if as_json:
        print_json(found.as_json())
    else:
        _show(found)


@dataclass(frozen=True)
class _Findings:
    """What a demo leaves behind; `answers` are by strength, in the order of the recipe's questions."""

    recipe: Recipe
    model: str
    file: Path
    vector: SteeringVector
    answers: Mapping[float, Sequence[str]]
    curve: Curve | None
    kinds: Sequence[Kind]
    card: Path
    picture: Path | None

    def as_json(self) -> dict[str, Any]:
        """Everything, as one JSON object."""
        return {
            "recipe": self.recipe.name,
            "model": self.model,
            "vector": {"file": str(self.file), **self.vector.describe()},
            "answers": [
                {"prompt": question, "strength": strength, "text": texts[number]}
                for number, question in enumerate(self.recipe.evaluate.questions)
                for strength, texts in self.answers.items()
            ],
            **self._measured(),
            "card": str(self.card),
            "picture": None if self.picture is None else str(self.picture),
        }

    def _measured(self) -> dict[str, Any]:
        """The curve, or what each kind of prompts got."""
        if self.curve is None:
            return {"kinds": [kind.as_json() for kind in self.kinds]}
        return {
            "curve": self.curve.as_rows(),
            "items": self.curve.items,
            "rises": self.curve.rises,
            "clear_of_controls": self.curve.clear_of_controls,
        }


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr while it is a terminal; gives what advances it."""
    from rich.progress import Progress

    console = stderr()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("answering and measuring", total=total)
        yield lambda: bar.advance(task)


def _write_card(
    path: Path,
    vector: SteeringVector,
    curve: Curve | None,
    kinds: Sequence[Kind],
    answers: Mapping[float, Sequence[str]],
    questions: Sequence[str],
) -> Path:
    from steerkit.report.card import Answer, vector_card

    listed = [
        Answer(question, dose, texts[number])
        for number, question in enumerate(questions)
        for dose, texts in answers.items()
    ]
    card = vector_card(path.stem, vector, curve=curve, kinds=kinds, answers=listed, new_tokens=MAX_NEW_TOKENS)
    path.write_text(card, encoding="utf-8")
    return path


def _draw(curve: Curve, path: Path, recipe: Recipe, vector: SteeringVector) -> Path | None:
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from steerkit.report.plots.curves import plot_curve

    return plot_curve(curve, path, title=recipe.title or recipe.name, unit=vector.unit)


def _show(found: _Findings) -> None:
    console, recipe = stdout(), found.recipe
    typer.echo(f"{recipe.name} on {found.model}: {recipe.title or recipe.behaviour}")
    typer.echo(f"wrote {found.file} and {found.card.name}")
    console.print(sites_table(found.vector.describe()))
    for number, question in enumerate(recipe.evaluate.questions):
        _show_answers(console, question, {dose: texts[number] for dose, texts in found.answers.items()})
    if found.curve is None:
        _show_kinds(console, found.kinds, recipe)
    else:
        _show_curve(console, found.curve)
    if found.curve is not None and found.picture is None:
        typer.echo("no picture: matplotlib is missing; pip install 'steerkit-hf[plots]'")
    elif found.picture is not None:
        typer.echo(f"picture: {found.picture}")
    typer.echo("try next:")
    typer.echo(
        f"  {usage_line(recipe.evaluate.questions[0], str(found.file), strength=max(found.answers), model=found.model)}"
    )
    typer.echo(f"  steerkit inspect {shlex.quote(str(found.file))}")
    typer.echo("  steerkit recipes")


def _show_answers(console: Console, question: str, answers: Mapping[float, str]) -> None:
    """The answers to one question, a column for each strength."""
    from rich.table import Table

    shown = Table(expand=True, title=question, title_justify="left", title_style="bold")
    for dose in answers:
        shown.add_column(f"strength {_signed(dose)}", ratio=1)
    shown.add_row(*(" ".join(text.split()) for text in answers.values()))
    console.print(shown)


def _show_curve(console: Console, curve: Curve) -> None:
    """The margins as a table, and what they say in one line."""
    columns = ("strength", "margin", "95 % interval", f"{CONTROLS} random directions")
    shown = table(*columns, right=columns, title=f"Preference margin, {curve.items} held-out items, nats per token")
    for row in curve.as_rows():
        interval, randoms = (row["low"], row["high"]), (min(row["random"]), max(row["random"]))
        spans = [f"{low:+.2f} .. {high:+.2f}" for low, high in (interval, randoms)]
        shown.add_row(_signed(row["strength"]), f"{row['effect']:+.3f}", *spans)
    console.print(shown)
    rises, clear = ("yes" if found else "no" for found in (curve.rises, curve.clear_of_controls))
    typer.echo(f"rises over the whole range: {rises}; outer intervals clear of random directions: {clear}")


def _show_kinds(console: Console, kinds: Sequence[Kind], recipe: Recipe) -> None:
    """What each kind of prompts got, as a table."""
    columns = ("prompts", "", "refused before", "refused", "unchanged")
    shown = table(*columns, right=columns[1:], title=f"Answers at strength {kinds[0].strength:g}, percent")
    names = {"positive": recipe.data.positive or "", "negative": recipe.data.negative or f"not {recipe.data.positive}"}
    for kind in kinds:
        shares = [
            f"{100 * share.mean:.0f} ({100 * share.low:.0f} to {100 * share.high:.0f})"
            for share in (kind.before, kind.refused, kind.unchanged)
        ]
        shown.add_row(names[kind.side], str(kind.items), *shares)
    console.print(shown)


def _signed(strength: float) -> str:
    return f"{strength:+g}" if strength else "0"
