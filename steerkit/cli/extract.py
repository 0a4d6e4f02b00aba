"""`steerkit extract`: fit a vector from a recipe or from one's own prompts, and write its file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.progress import status
from steerkit.cli._data import NO_DATA, DataChoice, recipe_of, takes_data
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._processes import shares_work
from steerkit.cli._shared import (
    BatchSize,
    Json,
    ReadoutOption,
    print_json,
    readout_of,
    sites_table,
    stdout,
    usage_line,
)
from steerkit.cli._written import check_written

if TYPE_CHECKING:
    from steerkit.evaluate.setup import Setup
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]

QUESTION = "How was your day?"


MethodOption = Annotated[str | None, typer.Option(help="See `steerkit methods`. (default: the recipe's, else caa)")]
LayersOption = Annotated[
    str | None,
    typer.Option(help="Blocks from 0, such as 11,13 or 10-14 (both ends included); auto finds the best one."),
]
OutOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write. (default: <recipe>.safetensors)")]


@shares_work
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
    check_written(layers=None if layers == "auto" else layers, readout=readout)
    if recipe is None and out is None:
        raise typer.BadParameter("--out says where to write; only a RECIPE has a default")
    if out is not None and out in map(Path, given.files):
        raise typer.BadParameter(f"--out {out} would overwrite what is read")

    import steerkit
    from steerkit.evaluate.setup import Setup
    from steerkit.evaluate.suggesting import with_suggestion
    from steerkit.methods._registry import example_strength, resolve

    resolve(method or "caa")
    fit: Callable[..., SteeringVector]
    settings: Mapping[str, Any] = {}
    reading = readout_of(readout)
    if recipe is not None:
        chosen = recipe_of(recipe, given)
        target, model = out or Path(f"{chosen.name}.safetensors"), model.of(chosen.model)
        model.check_layers(None if layers == "auto" else layers, chosen.model)
        question = next(iter(chosen.evaluate.questions), QUESTION)
        part = chosen.method_part(method)
        train, name = chosen.split(part.name)[0], part.name  # mistakes in the data are told before a model is loaded
        settings, reading = part.settings, part.readout if reading is None else reading
        fit = partial(chosen.extract, method=method, readout=readout_of(readout))
    else:
        train, rest = given.parts()
        target = out or Path()
        question, name = QUESTION, method or "caa"
        fit = partial(steerkit.fit, data=train, method=name, readout=reading, held_out=rest)
    check_writable(target)
    _tell_of_items(train, name, is_read=readout is not None or recipe is not None)
    loaded, tokenizer = model.load()
    if recipe is None or recipe.endswith(".toml"):  # of what ships it is told where it is measured
        _tell_of_confounds(tokenizer, train, name, readout_of(readout))
    if layers == "auto":
        setup = Setup(loaded, tokenizer, batch_size=batch_size)
        layers = _found_layer(setup, train, name, settings=settings, readout=reading)
    vector = fit(loaded, tokenizer, layers=layers, batch_size=batch_size, progress=True)
    with status("finding a strength"):
        vector = with_suggestion(loaded, tokenizer, vector, batch_size=batch_size)
    vector.save(target)
    if as_json:
        print_json({"file": str(target), **vector.describe()})
    else:
        _show(vector, target, usage_line(question, str(target), strength=example_strength(vector), model=model))


def _found_layer(setup: Setup, train: ContrastSet, method: str, **options: Any) -> str:
    """The block at which the method separates items best; what was found is said on stderr."""
    from steerkit.evaluate.blocks import best_layer, find_layer

    with status("comparing blocks"):
        found = find_layer(setup, train, method, **options)
    best = best_layer(found)
    own = next(one for one in found if one.layer == best)
    typer.echo(
        f"block {best} of {setup.decoder.num_layers}: separates best (AUC {own.auc:.3f}, d {own.cohens_d:.2f}) among "
        f"blocks {found[0].layer} to {found[-1].layer}; `steerkit layers` draws them all",
        err=True,
    )
    return str(best)


def _tell_of_items(data: ContrastSet, method: str, *, is_read: bool) -> None:
    """Warn of repeated items, equal sides, a single pair and a readout nobody chose, before a model is loaded."""
    from steerkit.evaluate.data_notes import data_notes, readout_note
    from steerkit.methods._base import takes_pair
    from steerkit.methods._registry import resolve

    kind = resolve(method)
    notes = data_notes(data, fewest=1 if takes_pair(kind) else 2)
    for note in [*notes, None if is_read else readout_note(data, kind.readout)]:
        if note is not None:
            warnings.warn(note, stacklevel=2)


def _tell_of_confounds(tokenizer: Any, data: ContrastSet, method: str, readout: str | int | None) -> None:
    """Warn of length and format that predict the label."""
    from steerkit.evaluate.data_notes import confound_notes
    from steerkit.methods._base import has_sides
    from steerkit.methods._registry import resolve

    if not has_sides(resolve(method)):
        return
    reading = resolve(method).readout if readout is None else readout
    for note in confound_notes(tokenizer, data, readout=reading):
        warnings.warn(note, stacklevel=2)


def _show(vector: SteeringVector, target: Path, usage: str) -> None:
    from steerkit.methods._registry import resolve

    console, facts = stdout(), vector.describe()
    items = (facts["held_out"] or {}).get("items")
    measured = f"separation measured on {items} held-out items" if items else "--held-out 0.25 measures the separation"
    separates = resolve(vector.method).readout is not None
    typer.echo(f"wrote {target}\n{vector.method}" + (f"; {measured}" if separates else ""))
    console.print(sites_table(facts))
    typer.echo(f"use it:\n  {usage}")
