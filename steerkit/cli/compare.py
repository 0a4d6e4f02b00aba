"""`steerkit compare`: every method on one behaviour, each calibrated to the same budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.json_values import jsonable
from steerkit._support.progress import status
from steerkit.cli._compare_files import command_line, kept_rows, together, write
from steerkit.cli._data import NO_DATA, DataChoice, recipe_of, takes_data
from steerkit.cli._evidence import (
    MaxKl,
    MaxPplRatio,
    MaxRepetition,
    Neutral,
    check_items,
)
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._processes import shares_work
from steerkit.cli._prompting import systems_of
from steerkit.cli._shared import (
    BatchSize,
    Json,
    print_json,
    stdout,
    table,
)

if TYPE_CHECKING:
    from steerkit.evaluate.compare import Row
    from steerkit.evaluate.compare_prompting import Asking
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.recipe import MethodPart, Recipe
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]

USUAL = "optimism"

BehaviourArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE", help="A behaviour that recipes are shipped for, or a recipe's file. (default: optimism)"
    ),
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option(help="Repeatable; prompting is that row alone. (default: all that pairs of answers measure)"),
]
PromptingOption = Annotated[
    bool, typer.Option(help="Rows of system prompts that ask for the behaviour, and of the best method on top of one.")
]
SystemOption = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="Such a system prompt; repeatable. (default: the recipe's)")
]
KeepOption = Annotated[
    bool, typer.Option("--keep", help="Keep what the folder's table says of other methods, on the same items.")
]


@shares_work
@loads_model
@takes_data
def run(
    behaviour: BehaviourArgument = None,
    given: DataChoice = NO_DATA,
    method: MethodOption = None,
    prompting: PromptingOption = True,
    system: SystemOption = None,
    max_kl: MaxKl = 0.3,
    max_ppl_ratio: MaxPplRatio = 1.3,
    max_repetition: MaxRepetition = 0.1,
    controls: Annotated[int, typer.Option(min=1, help="Random directions, and fits on shuffled labels.")] = 5,
    texts: Annotated[int, typer.Option(min=1, help="Prompts answered at the most.")] = 12,
    neutral: Neutral = 64,
    seed: Annotated[int, typer.Option(min=0, help="Fixes splits, controls and search.")] = 0,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 16,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where table and report go.")] = Path("out/compare"),
    keep: KeepOption = False,
    as_json: Json = False,
) -> None:
    """Compare the methods on one behaviour: effect, controls, KL, perplexity ratio, repetition, time.

    The behaviour is that of a recipe, or of your own pairs (--data). Every method is calibrated to the same budget on
    the same training items and measured on the same held-out ones. A method without a recipe of its own for the
    behaviour is fitted by the behaviour's default recipe. System prompts that ask for the behaviour stand beside them
    at their own costs: the wording that is best on the training items, and the best method on top of it. Writes
    <out>/<behaviour>.json, .md (the table) and .html (the report). A killed run goes on where it was.
    """
    from steerkit.evaluate.calibration.budget import Budget
    from steerkit.evaluate.setup import Setup
    from steerkit.evaluate.store import Store
    from steerkit.report.plots.drawing import ready

    ready()
    behaviour = behaviour or (None if given.is_given else USUAL)
    default = recipe_of(behaviour, given)
    budget = Budget(max_kl, max_ppl_ratio, max_repetition)
    systems = systems_of(default.prompting, system) if prompting or system else ()
    names = [name for name in dict.fromkeys(method or _every()) if name != "prompting" or not systems]
    target, kept = out / f"{default.behaviour}.json", out / f"{default.behaviour}.rows.jsonl"
    check_writable(target)
    sources = _sources(names, default) if names else {}
    train, held_out = default.split("caa")  # items, and no recipe's own pair
    for one, recipe in sources.items():
        check_items(recipe.name, one, recipe.split(one)[0], held_out)
    model = model.of(default.model)
    loaded, tokenizer = model.load()
    setup = Setup(loaded, tokenizer, held_out, batch_size=batch_size, texts=texts).first_neutral(neutral)
    numbered = {"controls": controls, "texts": texts, "neutral": neutral, "seed": seed, "batch-size": batch_size}
    asked = [*([] if behaviour is None else [behaviour]), *given.words(), *_words(prompting, system)]
    words = command_line(asked, method or [], budget, numbered, model)
    content = _content(default, model.name, setup, budget, words)
    before = kept_rows(target, content) if keep else []
    search = {"controls": controls, "seed": seed}
    common: dict[str, Any] = {"budget": budget, "store": Store(kept)}
    rows = _rows(sources, default, setup, search, common, before, train, systems)
    rows = together(rows, before) if keep else rows
    content["rows"] = [jsonable(row.as_json()) for row in rows]
    write(rows, content, target)
    kept.unlink(missing_ok=True)
    if as_json:
        print_json(content)
    else:
        _show(rows, default.behaviour, target)


def _words(prompting: bool, system: list[str] | None) -> list[str]:
    """What was said of system prompts, as on the command line."""
    return [*(f"--system={one}" for one in system or ()), *([] if prompting else ["--no-prompting"])]


def _every() -> list[str]:
    """All methods that pairs of answers measure; those that cannot be used are told of."""
    from steerkit.methods._base import has_sides, sorts_prompts
    from steerkit.methods._registry import usable_methods

    usable, broken = usable_methods()
    for problem in broken.values():
        typer.echo(f"note: {problem}", err=True)
    return [name for name, kind in usable.items() if has_sides(kind) and not sorts_prompts(kind)]


def _sources(names: Sequence[str], default: Recipe) -> dict[str, Recipe]:
    """By which recipe each method is fitted; one that there is nothing to fit on is left out.

    Raises:
        UnknownNameError: no method of that name.
        RecipeError: there is nothing to fit any of them on.
    """
    from steerkit.errors import RecipeError
    from steerkit.methods._base import takes_pair
    from steerkit.methods._registry import resolve
    from steerkit.recipe import of_behaviour

    found = {}
    # Recipes of the same name have nothing to do with data that stands in no recipe.
    others = of_behaviour(default.behaviour) if default.source != Path() else []
    for name, kind in {name: resolve(name) for name in names}.items():
        own = [recipe for recipe in (default, *others) if recipe.method.name == name]
        if own:  # its settings, but the items that all methods share
            found[name] = replace(own[0], data=replace(default.data, pair=own[0].data.pair), source=default.source)
        elif not takes_pair(kind):
            found[name] = default
    for one in sorted(set(names) - set(found)) if found else ():
        typer.echo(f"note: {one} is left out: no recipe of {default.behaviour} says what it is fitted on", err=True)
    if not found:
        raise RecipeError(f"{default.name}: there is nothing to fit {', '.join(names)} on; choose another --method")
    return found


def _rows(
    sources: dict[str, Recipe],
    default: Recipe,
    setup: Any,
    search: dict[str, Any],
    common: dict[str, Any],
    before: Sequence[Row],
    train: ContrastSet,
    systems: Sequence[str],
) -> list[Row]:
    """All rows that are measured now: of the methods, then of system prompts."""
    from steerkit.evaluate.compare_prompting import Asking

    with status("comparing") as step:
        found = [_row(one, recipe, default, setup, search, common, step) for one, recipe in sources.items()]
        rows = [row for row, _ in found]
        if systems:
            told: dict[str, Any] = {**common, "seed": search["seed"], "step": step}
            asking = Asking(setup, train, systems, default.name, default.evaluate.questions, **told)
            rows += _asked(asking, found, before, default)
    return rows


def _row(
    name: str, recipe: Recipe, default: Recipe, setup: Any, search: dict[str, Any], common: dict[str, Any], step: Any
) -> tuple[Row, SteeringVector | None]:
    """One method calibrated and measured, and its vector; what cannot be is told as such, and the rest goes on."""
    from steerkit.errors import SteerError
    from steerkit.evaluate.calibration.budget import Search
    from steerkit.evaluate.compare import Row, compared
    from steerkit.methods._registry import resolve

    kind = resolve(name)
    try:
        found = recipe.calibrate(
            setup,
            recipe.split(name)[0],
            _way(name, recipe),
            search=Search(candidates=recipe.candidates(setup.decoder.num_layers, name), **search),
            step=lambda note: step(f"{name}: {note}"),
            **common,
        )
    except SteerError as error:
        reason = f"could not be measured: {error}"
        return Row(name, kind.title, recipe.name, sites=(), strength=None, works=False, verdict=reason), None
    step(f"{name}: time and texts")
    return compared(setup, kind, recipe.name, found, default.evaluate.questions), found.vector


def _asked(
    asking: Asking, found: Sequence[tuple[Row, SteeringVector | None]], before: Sequence[Row], default: Recipe
) -> list[Row]:
    """The rows of system prompts: alone, and the best method of the table at their KL and on top."""
    from steerkit.evaluate.compare_prompting import best_method

    alone = asking.alone()
    vectors = {row.method: vector for row, vector in found}
    best = best_method([*(row for row in before if row.method not in vectors), *(row for row, _ in found)])
    if best is None or alone.effect is None:
        return [alone]
    vector = vectors.get(best.method) or _again(best, default, asking.setup)
    beside = asking.beside(alone, best, vector)
    return [alone, *([] if beside is None else [beside]), asking.under(alone, best, vector)]


def _again(row: Row, default: Recipe, setup: Any) -> SteeringVector:
    """The vector of a row that was kept, fitted again."""
    from steerkit.fitting.fitting import fit

    recipe = _sources([row.method], default)[row.method]
    part = _way(row.method, recipe)
    scope = recipe.scope_of(part)
    items, sites = recipe.split(row.method)[0], row.sites
    common: dict[str, Any] = {"settings": dict(part.settings), "readout": part.readout, "batch_size": setup.batch_size}
    vector = fit(setup.model, setup.tokenizer, items, method=row.method, sites=sites, **common)
    return vector if scope is None else replace(vector, scope=scope)


def _way(name: str, recipe: Recipe) -> MethodPart:
    """How a recipe fits a method; another method reads the tokens that the recipe's own does."""
    from steerkit.methods._registry import resolve

    part = recipe.method_part(name)
    readout = part.readout or (None if resolve(name).readout is None else recipe.method.readout)
    return replace(part, readout=readout)


def _content(default: Recipe, model: str, setup: Any, budget: Any, command: str) -> dict[str, Any]:
    """Everything needed to show the comparison and to repeat it, but for its rows."""
    from steerkit._support.commit import commit
    from steerkit.evaluate.store_identity import environment, setup_identity

    identity = setup_identity(setup)
    digests = {name: identity[name] for name in ("weights", "data", "neutral", "tokenizer_sha256")}
    plain: dict[str, Any] = jsonable(
        {
            "behaviour": default.behaviour,
            "model": model,
            "items": len(setup.data),
            "budget": asdict(budget),
            "rows": [],
            "environment": environment(),
            "commit": commit(),
            "digests": digests,
            "command": command,
        }
    )
    return plain


def _show(rows: list[Row], behaviour: str, target: Path) -> None:
    columns = ("method", "at", "effect (95 %)", "control", "KL", "ppl x", "rep.", "time", "ok")
    shown = table(*columns, right=columns[1:-1])
    shown.collapse_padding = True
    shown.columns[0].overflow = "fold"
    shown.columns[2].no_wrap = True
    for row in rows:
        costs = row.costs or {}
        figures = [costs.get(name) for name in ("kl", "perplexity_ratio", "repetition")]
        shown.add_row(
            row.method,
            "-" if row.strength is None else f"{row.strength:g}",
            "-" if row.effect is None else f"{row.effect.mean:+.2f} ({row.effect.low:+.2f}, {row.effect.high:+.2f})",
            "-" if row.controls is None else f"{row.controls[1]:+.2f}",
            *("-" if one is None else f"{one.mean:.2f}" for one in [*figures, row.overhead]),
            ("yes" if row.works else "no") + ("*" if row.own_costs else ""),
        )
    typer.echo(f"{behaviour}: change against the unsteered model")
    stdout().print(shown)
    if any(row.own_costs for row in rows):
        typer.echo("* at its own costs, outside of the budget of the methods or not")
    for row in rows:
        stdout().print(f"{row.method}: {row.verdict}")
    typer.echo(f"wrote {target}, .md and .html")
