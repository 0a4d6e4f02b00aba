"""`steerkit sweep`: the same figures at many layers and strengths."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.json_values import jsonable
from steerkit._support.progress import bar, status
from steerkit.cli._data import NO_DATA, DataChoice, recipe_of, takes_data
from steerkit.cli._evidence import (
    Behaviour,
    Items,
    Judge,
    Markers,
    OnOption,
    Screen,
    items_on,
    layers_text,
    numbers,
    scorers_of,
)
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._processes import shares_work
from steerkit.cli._shared import (
    BatchSize,
    Json,
    ReadoutOption,
    number,
    print_json,
    readout_of,
    stdout,
    table,
)
from steerkit.cli._written import check_written

if TYPE_CHECKING:
    from steerkit.evaluate.fits import Fits
    from steerkit.evaluate.scorers._base import Scorer
    from steerkit.evaluate.setup import Setup
    from steerkit.evaluate.sweeps import Point
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.recipe import MethodPart, Recipe

__all__ = ["run"]


class Format(StrEnum):
    """How the table is stored."""

    jsonl = "jsonl"
    parquet = "parquet"


LayersOption = Annotated[
    str | None,
    typer.Option(help="8-14 is each block on its own, 12+14 both together. (default: the recipe's, eight others)"),
]
StrengthsOption = Annotated[
    list[str] | None, typer.Option(help="Such as 0.5,1,2. (default: the method's ladder, both signs)")
]
ScorerOption = Annotated[
    list[str] | None,
    typer.Option(help="Repeatable. (default: preference_margin, divergence, repetition)"),
]
ScreenOption = Annotated[
    Screen,
    typer.Option(help="Layers in the order given, or (attribution) those first whose slopes promise most."),
]
OutOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where the figures go. (default: out/sweep-<name>)")
]


@shares_work
@loads_model
@takes_data
def run(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name, behaviour or file.")] = None,
    given: DataChoice = NO_DATA,
    layers: LayersOption = None,
    strengths: StrengthsOption = None,
    method: Annotated[str | None, typer.Option(help="Another method than the recipe's.")] = None,
    readout: ReadoutOption = None,
    scorer: ScorerOption = None,
    on: OnOption = Items.validation,
    screen: ScreenOption = Screen.steering,
    out: OutOption = None,
    form: Annotated[Format, typer.Option("--format", help="Of the table.")] = Format.jsonl,
    markers: Markers = None,
    behaviour: Behaviour = None,
    judge: Judge = None,
    controls: Annotated[int, typer.Option(min=0, help="Random directions beside every place.")] = 1,
    texts: Annotated[int, typer.Option(min=1, help="Held-out prompts answered at each place.")] = 8,
    neutral: Annotated[int, typer.Option(min=1, help="Neutral texts costs are measured on at each place.")] = 16,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Measure a recipe at many layers and strengths: effect, costs, intervals, beside the unsteered model.

    Your own pairs (--data) stand in the place of a recipe. Every figure is kept as soon as it is there: started again,
    a killed sweep goes on where it was. Writes FOLDER/table.jsonl (or .parquet) and FOLDER/sweep.png. Choose on the
    validation items: what the held-out ones say counts only if nothing was chosen on them.
    """
    from steerkit.evaluate.layer_sets import parse_candidates
    from steerkit.evaluate.setup import Setup
    from steerkit.evaluate.store import Store
    from steerkit.evaluate.sweep_table import save_table
    from steerkit.evaluate.sweeps import sweep
    from steerkit.methods._registry import resolve

    check_written(layer_sets=layers, readout=readout, method=method)
    chosen = recipe_of(recipe, given, method)
    part = chosen.method_part(method)
    part = replace(part, readout=readout_of(readout)) if readout is not None else part
    wanted = numbers(strengths, "--strengths") or _both_signs(resolve(part.name))
    scorers = scorers_of(scorer, markers, behaviour, judge)
    folder = out or Path("out") / f"sweep-{chosen.name}"
    target = folder / f"table.{form.value}"
    _check_table(target, form)
    train, measured = items_on(chosen, part.name, on)
    model = model.of(chosen.model)
    model.check_layers(layers, chosen.model)
    loaded, tokenizer = model.load()
    setup = Setup(loaded, tokenizer, measured, batch_size=batch_size, texts=texts).first_neutral(neutral)
    depth = setup.decoder.num_layers
    listed = parse_candidates(layers, depth) if layers else chosen.candidates(depth, part.name)
    fits = _fits(setup, train, chosen, part, listed)
    if screen is Screen.attribution:
        listed = _by_promise(setup, fits, listed, scorers[0])
    store = Store(folder / "rows.jsonl")
    with bar("measuring", 1 + len(listed) * len(wanted)) as step:
        points = list(sweep(setup, fits, listed, wanted, scorers=scorers, store=store, controls=controls, step=step))
    save_table(points, target)
    effect = next(iter(scorers[0].columns))
    picture = _draw(points, effect, folder / "sweep.png")
    if as_json:
        files = {"table": str(target), "picture": None if picture is None else str(picture)}
        print_json(jsonable({**files, "effect": effect, "points": [point.as_row() for point in points]}))
        return
    _show(points, effect, [next(iter(scorer.columns)) for scorer in scorers])
    _show_files(target, picture)


def _check_table(target: Path, form: Format) -> None:
    """Find out whether the table can be written.

    Raises:
        SteerError: it cannot, or pyarrow is missing.
    """
    from steerkit.errors import SteerError

    check_writable(target)
    if form is Format.parquet and importlib.util.find_spec("pyarrow") is None:
        raise SteerError(f"{target}: parquet needs pyarrow; pip install 'steerkit-hf[datasets]'")


def _both_signs(method: Any) -> list[float]:
    """The method's ladder, mirrored where it has a neutral strength of 0."""
    ladder = list(method.ladder)
    return [-strength for strength in reversed(ladder)] + ladder if method.neutral == 0 else ladder


def _fits(
    setup: Setup, train: ContrastSet, recipe: Recipe, part: MethodPart, listed: Sequence[tuple[int, ...]]
) -> Fits:
    """What fits the recipe's vector at any of the layers."""
    from steerkit.evaluate.fits import Fits

    every = sorted({layer for one in listed for layer in one})
    how = (part.name, every, part.settings, part.readout, recipe.scope_of(part))
    return Fits(setup, train, *how, kinds=recipe.kinds(part), progress=True)


def _by_promise(setup: Setup, fits: Fits, listed: Sequence[tuple[int, ...]], scorer: Scorer) -> list[tuple[int, ...]]:
    """Sets of layers, those first whose slopes promise the largest effect at an equal cost."""
    from steerkit.evaluate.attribution.promises import Promises
    from steerkit.evaluate.calibration.budget import Budget

    with status("slopes"):
        return list(Promises(setup, fits, scorer, max_kl=Budget().max_kl).of(listed))


def _show_files(target: Path, picture: Path | None) -> None:
    typer.echo(f"wrote {target}" + (f" and {picture.name}" if picture else ""))
    if picture is None:
        typer.echo("no picture: matplotlib is missing; pip install 'steerkit-hf[plots]'")


def _draw(points: list[Point], effect: str, path: Path) -> Path | None:
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from steerkit.report.plots.curves import plot_sweep

    return plot_sweep(points, effect, path)


def _show(points: list[Point], effect: str, firsts: list[str]) -> None:
    """A line for each place: the effect with its interval, the costs, and the first figure of every other scorer."""
    costs = [name for name in ("kl", "perplexity_ratio", "repetition") if name in points[0].scores and name != effect]
    costs += [name for name in dict.fromkeys(firsts) if name not in (*costs, effect)]
    short = {"kl": "KL", "perplexity_ratio": "ppl x", "repetition": "rep."}
    columns = ("layers", "at", f"{effect} (95 %)", "random", *(short.get(name, name) for name in costs))
    shown = table(*columns, right=columns[1:])
    for point in points:
        found = point.scores[effect].estimate
        shown.add_row(
            layers_text(point.layers) or "unsteered",
            "-" if point.strength is None else f"{point.strength:g}",
            f"{found.mean:+.3f} ({found.low:+.2f}, {found.high:+.2f})",
            f"{max(point.random, key=abs):+.2f}" if point.random else "-",
            *(number(point.scores[name].estimate.mean, ".3f") for name in costs),
        )
    stdout().print(shown)
