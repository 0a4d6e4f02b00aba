"""What the commands that measure share: reading lists, finding the data of a vector, showing progress and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from steerkit.cli._shared import number, stderr, table

if TYPE_CHECKING:
    from rich.table import Table

    from steerkit.data import ContrastSet
    from steerkit.evaluate.scoring import Measured
    from steerkit.vector import SteeringVector

__all__ = ["columns_table", "data_of", "estimate", "jsonable", "numbers", "progress", "status"]


def numbers(texts: Sequence[str] | None, option: str) -> list[float]:
    """Numbers given as a repeated option, as a list parted by commas, or both.

    Args:
        texts: what was given.
        option: its name, for the message.

    Raises:
        BadParameter: one is not a finite number.
    """
    found = []
    for text in ",".join(texts or ()).split(","):
        if not text.strip():
            continue
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise typer.BadParameter(f"{option}: {text.strip()!r} is no finite number; give such as 0.5,1,2")
        found.append(value)
    return found


def data_of(vector: SteeringVector, file: Path | None) -> tuple[ContrastSet | None, ContrastSet | None]:
    """What a vector was fitted on and what was held out, as far as that is known.

    Args:
        vector: the vector.
        file: a JSONL contrast set to measure on instead of the recipe's held-out items.

    Returns:
        Training items (None where the recipe's are not those the vector was fitted on) and items to measure on.

    Raises:
        DataError: the file cannot be used.
        RecipeError: the recipe's data cannot be read.
    """
    from steerkit.data import ContrastSet
    from steerkit.recipe import find_recipe
    from steerkit.shipped import recipes

    train = held_out = None
    if vector.recipe in recipes():
        fitted, held_out = find_recipe(vector.recipe).split()
        train = fitted if fitted.digest == vector.data_digest else None
        held_out = held_out if train is not None else None
    return train, held_out if file is None else ContrastSet.from_jsonl(file)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar with the time left on stderr while it is a terminal; gives what advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def status(first: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, while it is a terminal."""
    console = stderr()
    if not console.is_terminal:
        yield lambda note: None
        return
    with console.status(first) as line:
        yield line.update


def estimate(found: Any, form: str = ".3f") -> str:
    """A mean with its interval, in one cell."""
    if found is None:
        return "-"
    return f"{found.mean:{form}} ({found.low:{form}}, {found.high:{form}})"


def columns_table(scores: Mapping[str, Measured], title: str | None = None) -> Table:
    """One line per figure: its mean, the change against the unsteered model, both with 95 % intervals."""
    shown = table("figure", "mean (95 %)", "change (95 %)", "items", right=("items",), title=title)
    for name, measured in scores.items():
        missing = f" ({measured.failures} failed)" if measured.failures else ""
        change = measured.change
        shown.add_row(
            name,
            estimate(measured.estimate),
            "-" if change is None else ("x " if measured.column.scale == "log" else "") + estimate(change),
            number(measured.items, "d") + missing,
        )
    return shown


def jsonable(value: Any) -> Any:
    """Plain data with null in the place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
