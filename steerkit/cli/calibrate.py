"""`steerkit calibrate`: the largest effect inside a budget of costs, confirmed on held-out items."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.json_values import jsonable
from steerkit._support.progress import status
from steerkit.cli._data import NO_DATA, DataChoice, recipe_of, takes_data
from steerkit.cli._evidence import (
    Behaviour,
    Judge,
    Markers,
    MaxKl,
    MaxPplRatio,
    MaxRepetition,
    Neutral,
    Screen,
    check_items,
    columns_table,
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
    usage_line,
)
from steerkit.cli._written import check_written

if TYPE_CHECKING:
    from steerkit.evaluate.calibration.result import Calibration
    from steerkit.evaluate.setup import Setup
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.recipe import MethodPart, Recipe

__all__ = ["run"]


LayersOption = Annotated[
    str | None,
    typer.Option(help="8-14 is each block on its own, 12+14 both together. (default: the recipe's, eight others)"),
]
EffectOption = Annotated[str, typer.Option(help="The scorer that shows the effect; more is better.")]
ScorerOption = Annotated[
    list[str] | None, typer.Option(help="Shown beside, at the same strengths; chooses nothing. Repeatable.")
]
ScreenOption = Annotated[
    Screen,
    typer.Option(
        help="Rank the layers by steering at each, or by slopes from gradients: only those near the best climb then."
    ),
]
TryOption = Annotated[
    list[str] | None,
    typer.Option("--try", metavar="SETTING=VALUES", help="Values of a method's setting: heads=8,16,32. Repeatable."),
]
TrialsOption = Annotated[int | None, typer.Option(min=1, help="Let optuna choose so many points, for large grids.")]
OutOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write. (default: <name>.safetensors)")]


@shares_work
@loads_model
@takes_data
def run(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name, behaviour or file.")] = None,
    given: DataChoice = NO_DATA,
    max_kl: MaxKl = 0.3,
    max_ppl_ratio: MaxPplRatio = 1.3,
    max_repetition: MaxRepetition = 0.1,
    layers: LayersOption = None,
    strengths: Annotated[list[str] | None, typer.Option(help="Such as 0.5,1,2. (default: the method's ladder)")] = None,
    method: Annotated[str | None, typer.Option(help="Another method than the recipe's.")] = None,
    readout: ReadoutOption = None,
    effect: EffectOption = "preference_margin",
    scorer: ScorerOption = None,
    markers: Markers = None,
    behaviour: Behaviour = None,
    judge: Judge = None,
    screen: ScreenOption = Screen.steering,
    tried: TryOption = None,
    trials: TrialsOption = None,
    controls: Annotated[int, typer.Option(min=1, help="Random directions, and fits on shuffled labels.")] = 5,
    texts: Annotated[int, typer.Option(min=1, help="Prompts answered at the most.")] = 12,
    neutral: Neutral = 64,
    seed: Annotated[int, typer.Option(min=0, help="Fixes splits, controls and search.")] = 0,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 16,
    out: OutOption = None,
    as_json: Json = False,
) -> None:
    """Find the layers and strength with the largest effect inside a budget, and confirm them on held-out items.

    Of a recipe, or of your own pairs (--data), a quarter of which is held out unless --held-out or the file says more.

    Chooses on a part of the training items; only the held-out items, looked at once, decide whether it works.
    Figures are kept beside the file (<FILE>.rows.jsonl) until it is written, so that a killed run goes on.
    Exit code 1 where nothing works.
    """
    from steerkit.evaluate.calibration.budget import Budget, Search
    from steerkit.evaluate.layer_sets import parse_candidates
    from steerkit.evaluate.setup import Setup

    check_written(layer_sets=layers, readout=readout, method=method)
    chosen = recipe_of(recipe, given, method)
    part = chosen.method_part(method)
    part = replace(part, readout=readout_of(readout)) if readout is not None else part
    shown, *beside = scorers_of([effect, *(scorer or [])], markers, behaviour, judge)
    how: dict[str, Any] = {"controls": controls, "trials": trials, "seed": seed, "screen": screen.value}
    how |= {"strengths": _ladder(strengths, part.name), "settings": _settings(tried)}
    budget = Budget(max_kl, max_ppl_ratio, max_repetition)
    target = out or Path(f"{chosen.name}.safetensors")
    check_writable(target)
    train, held_out = chosen.split(part.name)
    check_items(chosen.name, part.name, train, held_out)
    model = model.of(chosen.model)
    model.check_layers(layers, chosen.model)
    loaded, tokenizer = model.load()
    setup = Setup(loaded, tokenizer, held_out, batch_size=batch_size, texts=texts).first_neutral(neutral)
    depth = setup.decoder.num_layers
    listed = parse_candidates(layers, depth) if layers else chosen.candidates(depth, part.name)
    options = {"effect": shown, "beside": beside, "budget": budget, "search": Search(candidates=listed, **how)}
    found = _calibrated(setup, train, chosen, part, target, **options)
    if as_json:
        print_json(jsonable({"file": str(target) if found.vector is not None else None, **found.as_json()}))
    else:
        _show(found, target)
        _show_usage(found, target, chosen.evaluate.questions[0], model)
    if not found.works:
        raise typer.Exit(1)


def _ladder(strengths: list[str] | None, method: str) -> list[float] | None:
    """The strengths to try; None where the method's own are.

    Raises:
        BadParameter: they lie on both sides of the neutral strength.
    """
    from steerkit.methods._registry import resolve

    ladder = numbers(strengths, "--strengths") or None
    lowest = resolve(method).neutral
    if ladder and lowest is not None and not (min(ladder) > lowest or max(ladder) < lowest):
        raise typer.BadParameter(f"--strengths: a ladder leads away from {lowest:g}; give strengths on one side of it")
    return ladder


def _settings(tried: list[str] | None) -> dict[str, list[Any]]:
    """Settings with the values to try, read as recipes write them; what is no TOML value is a text.

    Raises:
        BadParameter: one is not of the form SETTING=VALUES.
    """
    import tomllib

    found: dict[str, list[Any]] = {}
    for text in tried or ():
        name, equals, values = text.partition("=")
        if not (equals and name.strip() and all(one.strip() for one in values.split(","))):
            raise typer.BadParameter(f"--try: {text!r}; give a setting and its values, such as heads=8,16,32")
        for value in values.split(","):
            try:
                read = tomllib.loads(f"value = {value.strip()}")["value"]
            except tomllib.TOMLDecodeError:
                read = value.strip()
            found.setdefault(name.strip(), []).append(read)
    return found


def _calibrated(
    setup: Setup, train: ContrastSet, recipe: Recipe, part: MethodPart, target: Path, **options: Any
) -> Calibration:
    """The search and its vector's file, with figures beside the file for as long as it is not written."""
    from steerkit.evaluate.store import Store

    rows = target.with_name(f"{target.stem}.rows.jsonl")
    with status("fitting") as step:
        found = recipe.calibrate(setup, train, part, store=Store(rows), step=step, **options)
    _save(found, recipe, part, target)
    rows.unlink(missing_ok=True)
    return found


def _save(found: Calibration, recipe: Recipe, part: MethodPart, target: Path) -> None:
    """Write the vector, if one was found."""
    if found.vector is None:
        return
    vector = recipe.signed(found.vector, replace(part, layers=found.layers, sites=None))
    replace(vector, suggested_strength=found.vector.suggested_strength, unit="paper").save(target)


def _show_usage(found: Calibration, target: Path, question: str, model: ModelChoice) -> None:
    if found.works and found.strength is not None:
        usage = usage_line(question, str(target), strength=found.strength, model=model)
        typer.echo(f"use it:\n  {usage}")


def _show(found: Calibration, target: Path) -> None:
    console = stdout()
    columns = ("layers", "at", "effect (95 %)", "KL", "ppl x", "rep.", "")
    shown = table(*columns, right=columns[1:-1])
    for point in found.points:
        change = point.scores[found.effect].effect
        chosen = point.layers == found.layers and point.strength == found.strength
        over = found.budget.breaks(dict(point.scores))
        shown.add_row(
            layers_text(point.layers),
            f"{point.strength:g}",
            f"{change.mean:+.2f} ({change.low:+.2f}, {change.high:+.2f})",
            *(
                number(point.scores[name].effect.mean if name in point.scores else None, ".2f")
                for name in ("kl", "perplexity_ratio", "repetition")
            ),
            "chosen" if chosen else "over" if over else "",
        )
    console.print(f"tried on the validation split; budget: {_budget(found)}")
    console.print(shown)
    for one in found.variants:
        values = ", ".join(f"{name} = {value}" for name, value in one["settings"].items())
        gain = "nothing" if one["gain"] is None else f"{one['gain']:+.3f} at strength {one['strength']:g}"
        console.print(f"{values}: {gain}")
    if found.confirmed:
        console.print(f"held-out items at layers {layers_text(found.layers)}, strength {found.strength:g}")
        console.print(columns_table(found.confirmed))
    console.print(found.verdict)
    if found.vector is not None:
        typer.echo(f"wrote {target}" + ("" if found.works else ", whose strength is not confirmed"))


def _budget(found: Calibration) -> str:
    budget = found.budget
    return f"KL {budget.max_kl:g}, ppl ratio {budget.max_ppl_ratio:g}, repetition +{budget.max_repetition:g}"
