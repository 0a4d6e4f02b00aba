"""`steerkit extract`: fit a vector from a recipe or from one's own prompts, and write its file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerkit.cli._files import check_writable, read_prompts
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
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.recipe import Recipe
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
HeldOutOption = Annotated[
    float | None, typer.Option(metavar="FRACTION", help="Share of the items to measure the separation on.")
]
OutOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write. (default: <recipe>.safetensors)")]


@loads_model
def run(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name, behaviour or file.")] = None,
    positive: Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts that show the behaviour.")] = None,
    negative: Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts that do not.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="JSONL of pairs.")] = None,
    model: ModelChoice = DEFAULT,
    method: MethodOption = None,
    layers: LayersOption = None,
    readout: ReadoutOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave prompts as they are, without the chat template.")] = False,
    held_out: HeldOutOption = None,
    batch_size: BatchSize = 16,
    out: OutOption = None,
    as_json: Json = False,
) -> None:
    """Fit a steering vector from a recipe, or from your own prompts, and write its file.

    Your own prompts are two files of prompts (--positive, --negative), one a line, or one JSONL file of pairs (--data).
    """
    sources = (recipe, data, positive or negative)
    if sum(source is not None for source in sources) != 1:
        raise typer.BadParameter("give one of: RECIPE, --data, --positive with --negative")
    if (positive is None) != (negative is None):
        raise typer.BadParameter("--positive and --negative go together")
    if recipe is None and out is None:
        raise typer.BadParameter("--out says where to write; only a RECIPE has a default")
    if out is not None and out in (positive, negative, data):
        raise typer.BadParameter(f"--out {out} would overwrite what is read")
    if recipe is not None and raw:
        raise typer.BadParameter("--raw is for your own prompts; a recipe's data says it itself")

    import steerkit
    from steerkit.methods._registry import example_strength, resolve

    resolve(method or "caa")
    fit: Callable[..., SteeringVector]
    if recipe is not None:
        chosen = _recipe(recipe, held_out)
        target, model = out or Path(f"{chosen.name}.safetensors"), model.of(chosen.model)
        question = next(iter(chosen.evaluate.questions), QUESTION)
        fit = partial(chosen.extract, method=method, readout=_readout(readout))
    else:
        train, rest = _parts(_items(data, positive, negative, raw=raw), held_out)
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


def _recipe(name: str, held_out: float | None) -> Recipe:
    """The recipe, with what the command line changes in it."""
    from steerkit.recipe import find_recipe

    recipe = find_recipe(name)
    if held_out is not None:
        recipe = replace(recipe, data=replace(recipe.data, held_out=held_out))
    recipe.split()  # mistakes in the data are told before a model is loaded
    return recipe


def _items(data: Path | None, positive: Path | None, negative: Path | None, *, raw: bool) -> ContrastSet:
    """The contrast of the files given."""
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.prompts.conversation import Conversation

    if data is not None:
        items = ContrastSet.from_jsonl(data)
    else:
        assert positive is not None and negative is not None
        items = ContrastSet.from_prompts(read_prompts(positive), read_prompts(negative))
        items = replace(items, source=f"{positive.name}, {negative.name}")
    if raw:
        sides = [tuple(Conversation.of(item, raw=True) for item in side) for side in (items.positive, items.negative)]
        items = replace(items, positive=sides[0], negative=sides[1])
    return items


def _parts(items: ContrastSet, held_out: float | None) -> tuple[ContrastSet, ContrastSet | None]:
    """What is fitted and what is measured on; nothing is held out unless an option or the file says so."""
    return items.split(held_out=held_out) if held_out is not None or items.marks else (items, None)


def _show(vector: SteeringVector, target: Path, usage: str) -> None:
    console, facts = stdout(), vector.describe()
    items = (facts["held_out"] or {}).get("items")
    measured = f"separation measured on {items} held-out items" if items else "--held-out 0.25 measures the separation"
    typer.echo(f"wrote {target}\n{vector.method}; {measured}")
    console.print(sites_table(facts))
    typer.echo(f"use it:\n  {usage}")
