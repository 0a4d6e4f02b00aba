"""`steerkit extract`: fit a vector from a recipe or from one's own prompts, and write its file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerkit.cli._data import NO_DATA, DataChoice, recipe_of, takes_data
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import (
    BatchSize,
    Json,
    print_json,
    sites_table,
    stdout,
    usage_line,
)

if TYPE_CHECKING:
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]

QUESTION = "How was your day?"


MethodOption = Annotated[str | None, typer.Option(help="See `steerkit methods`. (default: the recipe's, else caa)")]
LayersOption = Annotated[
    str | None, typer.Option(help="Blocks counted from 0, such as 11,13 or 10-14 (both ends included).")
]
ReadoutOption = Annotated[
    str | None,
    typer.Option(help="Tokens read: last, mean, response_mean, answer_mean, an index. (default: the method's)"),
]
OutOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write. (default: <recipe>.safetensors)")]


@loads_model
@takes_data
def run(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name, behaviour or file.")] = None,
    given: DataChoice = NO_DATA,
    model: ModelChoice = DEFAULT,
    method: MethodOption = None,
    layers: LayersOption = None,
    readout: ReadoutOption = None,
    batch_size: BatchSize = 16,
    out: OutOption = None,
    as_json: Json = False,
) -> None:
    """Fit a steering vector from a recipe, or from your own prompts, and write its file.

    Your own prompts are two files of prompts (--positive, --negative) or one file of pairs or labelled prompts
    (--data), in any format. The separation is measured on what --held-out sets aside.
    """
    given.check(recipe, needed=True)
    if recipe is None and out is None:
        raise typer.BadParameter("--out says where to write; only a RECIPE has a default")
    if out is not None and out in map(Path, given.files):
        raise typer.BadParameter(f"--out {out} would overwrite what is read")

    import steerkit
    from steerkit.methods._registry import example_strength, resolve

    resolve(method or "caa")
    fit: Callable[..., SteeringVector]
    if recipe is not None:
        chosen = recipe_of(recipe, given)
        chosen.split()  # mistakes in the data are told before a model is loaded
        target, model = out or Path(f"{chosen.name}.safetensors"), model.of(chosen.model)
        question = next(iter(chosen.evaluate.questions), QUESTION)
        fit = partial(chosen.extract, method=method, readout=_readout(readout))
    else:
        train, rest = given.parts()
        target = out or Path()
        question = QUESTION
        fit = partial(steerkit.fit, data=train, method=method or "caa", readout=_readout(readout), held_out=rest)
    check_writable(target)
    loaded, tokenizer = model.load()
    vector = fit(loaded, tokenizer, layers=layers, batch_size=batch_size, progress=True)
    vector.save(target)
    if as_json:
        print_json({"file": str(target), **vector.describe()})
    else:
        _show(vector, target, usage_line(question, str(target), strength=example_strength(vector), model=model))


def _readout(text: str | None) -> str | int | None:
    try:
        return int(text or "")
    except ValueError:
        return text


def _show(vector: SteeringVector, target: Path, usage: str) -> None:
    console, facts = stdout(), vector.describe()
    items = (facts["held_out"] or {}).get("items")
    measured = f"separation measured on {items} held-out items" if items else "--held-out 0.25 measures the separation"
    typer.echo(f"wrote {target}\n{vector.method}; {measured}")
    console.print(sites_table(facts))
    typer.echo(f"use it:\n  {usage}")
