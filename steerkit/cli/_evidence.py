"""What the commands that measure share: reading lists, finding the data of a vector, showing figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from steerkit.cli._shared import number, table

if TYPE_CHECKING:
    from rich.table import Table

    from steerkit.cli._data import DataChoice
    from steerkit.evaluate.scorers._base import Scorer
    from steerkit.evaluate.scoring import Measured
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.recipe import Recipe
    from steerkit.vector.steering_vector import SteeringVector

__all__ = [
    "Behaviour",
    "Items",
    "Judge",
    "Markers",
    "MaxKl",
    "MaxPplRatio",
    "MaxRepetition",
    "Neutral",
    "OnOption",
    "Screen",
    "check_items",
    "check_way",
    "columns_table",
    "data_of",
    "estimate",
    "items_on",
    "layers_text",
    "numbers",
    "scorers_of",
]


class Items(StrEnum):
    """What is measured on."""

    validation = "validation"
    held_out = "held-out"


class Screen(StrEnum):
    """How sets of layers are ranked before strengths are tried."""

    steering = "steering"
    attribution = "attribution"


DEFAULT_SCORERS = ("preference_margin", "divergence", "repetition")

MaxKl = Annotated[float, typer.Option(min=0, help="Nats per token on neutral texts.")]
MaxPplRatio = Annotated[float, typer.Option(min=0, help="Perplexity of neutral texts, over unsteered.")]
MaxRepetition = Annotated[float, typer.Option(min=0, help="Rise of the share of repeated 4-grams in generated texts.")]
Markers = Annotated[list[str] | None, typer.Option(help="What the scorer markers looks for; repeatable.")]
Behaviour = Annotated[str | None, typer.Option(help="What the scorers judge and concept ask for.")]
Judge = Annotated[
    str | None, typer.Option(metavar="URL#MODEL", help="An OpenAI-compatible endpoint, or a local model's name.")
]
OnOption = Annotated[
    Items, typer.Option(help="Measure on a quarter of the training items, left out of the fit, or on the held-out.")
]
Neutral = Annotated[int, typer.Option(min=2, help="Neutral texts for the costs: half to choose on, half to confirm.")]


def numbers(texts: Sequence[str] | None, option: str) -> list[float]:
    """Numbers given as a repeated option, as a list parted by commas, or both.

    Args:
        texts: what was given.
        option: its name, for the message.

    Raises:
        BadParameter: one is not a finite number, or there is none in what was given.
    """
    found: list[float] = []
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
    if texts and not found:
        raise typer.BadParameter(f"{option}: got no number; give such as 0.5,1,2")
    return found


def scorers_of(
    names: list[str] | None, markers: list[str] | None, behaviour: str | None, judge: str | None
) -> list[Scorer]:
    """The scorers asked for, with what the command line sets of them.

    Args:
        names: of the scorers; None takes the default ones.
        markers: what the scorer markers looks for.
        behaviour: what a judge rates.
        judge: who judges.

    Raises:
        BadParameter: a scorer lacks what it needs, or what is given belongs to no scorer.
        UnknownNameError: no scorer of that name.
    """
    from steerkit.evaluate.judges.judging import judge_of
    from steerkit.evaluate.scoring import scorer_of

    listed = list(dict.fromkeys(names or DEFAULT_SCORERS))
    if markers and not {"markers", "attempts"} & set(listed):
        listed.append("markers")
    if judge and not {"judge", "concept", "attempts"} & set(listed):
        listed.append("concept")
    if "markers" in listed and not all(marker.strip() for marker in markers or [""]):
        raise typer.BadParameter("the scorer markers looks for words; give at least one, such as --markers sorry")
    settings: dict[str, dict[str, Any]] = {"markers": {"markers": tuple(markers or ())}}
    if "attempts" in listed:
        settings["attempts"] = {"judge": judge_of(judge) if judge else "", "markers": tuple(markers or ())}
    if behaviour or {"judge", "concept"} & set(listed):
        if not judge or not (behaviour or "").strip():
            raise typer.BadParameter("a judge rates a behaviour; give both --judge and --behaviour, in a few words")
        settings["judge"] = settings["concept"] = {"judge": judge_of(judge), "behaviour": behaviour}
    return [scorer_of(name, settings.get(name)) for name in listed]


def check_items(name: str, method: str, train: ContrastSet, held_out: ContrastSet) -> None:
    """Refuse fewer items than a calibration can be chosen and confirmed on: an interval needs two of each.

    Args:
        name: of the recipe, for the message.
        method: the method; one that is fitted on one pair of prompts needs no more of them.
        train: items that are fitted on and, a quarter of them, chosen on.
        held_out: items that confirm.

    Raises:
        DataError: there are too few.
    """
    from steerkit.errors import DataError
    from steerkit.methods._base import takes_pair
    from steerkit.methods._registry import resolve

    fewest = (1, 2) if takes_pair(resolve(method)) else (8, 2)
    if len(train) < fewest[0] or len(held_out) < fewest[1]:
        raise DataError(
            f"{name}: {len(train)} training and {len(held_out)} held-out items are too few to calibrate {method} on; "
            f"give at least {fewest[0]} and {fewest[1]}"
        )


def items_on(recipe: Recipe, method: str, on: Items) -> tuple[ContrastSet, ContrastSet]:
    """The items to fit on and those to measure on.

    Args:
        recipe: whose items they are.
        method: that is fitted.
        on: what is measured on.
    """
    train, held_out = recipe.split(method)
    if on is Items.held_out:
        return train, held_out
    validation = recipe.validation(method)
    return train.split(held_out=0.25, seed=recipe.data.seed) if validation is None else (train, validation)


def check_way(
    vector: SteeringVector, scope: str | None, unit: Literal["paper", "norm"] | None, *, has_strength: bool
) -> None:
    """Refuse a scope or a unit that the vector cannot be applied in, before a model is loaded.

    Args:
        vector: the vector.
        scope: tokens to write; None is the vector's own.
        unit: what strengths count in; None is the vector's own.
        has_strength: whether a strength was given in that unit.

    Raises:
        ScopeError: no scope of that name, or none of the method's.
        StrengthError: only the suggested strength is there, which counts in the other unit; or the edit has no length,
            or the file no activation norm, for unit `norm`.
    """
    from steerkit.errors import ScopeError, StrengthError
    from steerkit.methods._registry import method_of
    from steerkit.tokens.scope import Scope

    method = method_of(vector)
    written = Scope.parse(vector.scope if scope is None else scope)
    if written.kind not in method.scopes:
        raise ScopeError(f"{method.name}: scope '{written}' is not one of its own: {', '.join(method.scopes)}")
    if not has_strength:
        vector.at(unit=unit)
    if (vector.unit if unit is None else unit) != "norm":
        return
    for site in vector.sites:
        if not method.length(vector.params(site)):
            raise StrengthError(f"{method.name}: unit 'norm' needs an edit with a length; use --unit paper")
        if not math.isfinite(vector.typical(site) or math.nan):
            raise StrengthError(f"{site}: the vector file holds no activation norm, so use --unit paper")


def data_of(vector: SteeringVector, given: DataChoice) -> tuple[ContrastSet | None, ContrastSet | None]:
    """What a vector was fitted on and what was held out, as far as that is known.

    Args:
        vector: the vector.
        given: data to measure on instead of the recipe's held-out items: all of it, or what is held out of it.

    Returns:
        Training items (None where those that are known are not those the vector was fitted on) and items to measure on.

    Raises:
        BadParameter: a share of data is held out, and there is none.
        DataError: the data cannot be used.
        RecipeError: the recipe's data cannot be read.
    """
    from steerkit._support.shipped import recipes
    from steerkit.recipe import find_recipe

    if given.held_out is not None and not given.is_given:
        raise typer.BadParameter("--held-out is a share of --data, or of --positive and --negative; give them")
    train = held_out = None
    if vector.recipe in recipes():
        fitted, held_out = find_recipe(vector.recipe).split()
        train = fitted if fitted.digest == vector.data_digest else None
        held_out = held_out if train is not None else None
    if not given.is_given:
        return train, held_out
    fitted, rest = given.parts()
    if rest is None:
        return train, fitted
    return fitted if fitted.digest == vector.data_digest else train, rest


def estimate(found: Any) -> str:
    """A mean with its interval, in one cell; large numbers, such as perplexities, with fewer decimals."""
    if found is None:
        return "-"
    largest = max(abs(end) for end in found if math.isfinite(end))
    form = ".3f" if largest < 100 else ".1f" if largest < 1e4 else ".3g"
    return f"{found.mean:{form}} ({found.low:{form}}, {found.high:{form}})"


def layers_text(layers: Sequence[int]) -> str:
    """A set of layers in little room: 8+12-20."""
    from steerkit.network import sites

    return sites.layers_text(layers)


def columns_table(scores: Mapping[str, Measured]) -> Table:
    """One line per figure: its mean, the change against the unsteered model, both with 95 % intervals.

    And of what steering means to move the share of items that moved the other way.
    """
    told = any(measured.wrong_way is not None for measured in scores.values())
    more = ("wrong\nway",) if told else ()
    shown = table("figure", "mean (95 %)", "change (95 %)", "items", *more, right=("items", *more))
    for name, measured in scores.items():
        missing = f" ({measured.failures} failed)" if measured.failures else ""
        change = measured.change
        shown.add_row(
            name,
            estimate(measured.estimate),
            "-" if change is None else ("x " if measured.column.scale == "log" else "") + estimate(change),
            number(measured.items, "d") + missing,
            *(["-" if measured.wrong_way is None else f"{measured.wrong_way:.0%}"] if told else []),
        )
    return shown
