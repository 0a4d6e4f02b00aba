"""`steerkit find-strength`: the strength at which a score of generated texts crosses a target, from few noisy tries."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.json_values import jsonable
from steerkit._support.progress import status
from steerkit.cli._evidence import Behaviour, Judge, Markers, numbers, scorers_of
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import BatchSize, Json, number, print_json, stdout, table, usage_line

if TYPE_CHECKING:
    from steerkit.evaluate.bisection import FoundStrength
    from steerkit.evaluate.scorers._base import Scorer
    from steerkit.evaluate.setup import Setup
    from steerkit.prompts.conversation import Conversation
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]

VectorOption = Annotated[str, typer.Option(metavar="FILE", help="A vector file, a shipped name, or hub:USER/NAME.")]
ScorerOption = Annotated[str, typer.Option(help="What is scored of the generated texts.")]
ColumnOption = Annotated[str | None, typer.Option(help="Which of its figures. (default: its first)")]
TargetOption = Annotated[float, typer.Option(help="The mean score looked for, on the scale from 0 to 1.")]
ScaleOption = Annotated[
    str | None,
    typer.Option(metavar="LOW,HIGH", help="Which scores are 0 and 1. (default: 0,1; a judge's own scale)"),
]
RisesOption = Annotated[bool, typer.Option("--rises/--falls", help="Whether the score rises with the strength.")]
HighOption = Annotated[float, typer.Option(help="The highest strength that is tried.")]
LowOption = Annotated[float, typer.Option(help="The lowest.")]
AboutOption = Annotated[
    str | None, typer.Option(metavar="MEAN,SD", help="Where it is believed to be. (default: anywhere alike)")
]
TriesOption = Annotated[int, typer.Option(min=1, help="At the most.")]
EachOption = Annotated[int, typer.Option(min=1, help="Prompts answered in each try.")]
ToleranceOption = Annotated[
    float | None, typer.Option(help="Stop once both ends of the 90 % interval are so near. (default: all tries)")
]
PromptsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="What is answered. (default: the shipped neutral questions)")
]
OutOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the vector with that strength.")]


@loads_model
def run(
    vector: VectorOption,
    high: HighOption,
    low: LowOption = 0.0,
    scorer: ScorerOption = "compliance",
    column: ColumnOption = None,
    target: TargetOption = 0.3,
    rises: RisesOption = False,
    scale: ScaleOption = None,
    markers: Markers = None,
    behaviour: Behaviour = None,
    judge: Judge = None,
    about: AboutOption = None,
    tries: TriesOption = 20,
    each: EachOption = 4,
    tolerance: ToleranceOption = None,
    prompts: PromptsOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Fixes the order of the prompts.")] = 0,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 16,
    out: OutOption = None,
    as_json: Json = False,
) -> None:
    """Find the strength at which a score of generated texts crosses a target, with a 90 % interval.

    Each try answers fresh prompts at the strength where the crossing is most likely by then; a score votes for higher
    or lower as far as it is sure. Right only where the score changes one way with the strength. Unlike `calibrate` it
    knows of no costs and confirms nothing on held-out items.
    Exit code 1 where no score lay on the other side of the target: it may not be crossed between the ends.
    """
    from steerkit._support.shipped import vector_path
    from steerkit.evaluate.bisection import check_search, find_strength
    from steerkit.evaluate.judges.rubric import last_question
    from steerkit.evaluate.setup import Setup
    from steerkit.vector.steering_vector import SteeringVector

    if out is not None:
        check_writable(out)
    scoring = _only(scorers_of([scorer], markers, behaviour, judge))
    name, ends = _column(scoring, column), _ends(scale, scoring)
    prior = None if about is None else _two(about, "--about")
    check_search(target, low=low, high=high, about=prior, tolerance=tolerance)
    asked = _asked(prompts)
    chosen = SteeringVector.load(vector_path(vector, model.name))
    # What it is known to cost would be told again at every try.
    tried = replace(chosen, suggested_strength=None, calibration={})
    loaded, tokenizer = model.load()
    chosen.check(loaded, tokenizer)
    setup = Setup(loaded, tokenizer, prompts=asked, batch_size=batch_size, texts=each, max_new_tokens=max_new_tokens)
    with status("finding a strength") as step:
        score = _tried(setup, tried, scoring, name, ends, each, seed, step)
        how: dict[str, Any] = {"rises": rises, "about": prior, "tries": tries, "tolerance": tolerance}
        found = find_strength(score, target, low=low, high=high, **how)
    written = out if out is not None and found.is_bracketed else None
    if written is not None:
        replace(chosen, suggested_strength=found.strength, calibration={}).save(written)
    if as_json:
        file = None if written is None else str(written)
        print_json(jsonable({"vector": vector, "file": file, "column": name, **found.as_json()}))
    else:
        _show(found, name)
        _show_usage(found, written, vector, last_question(asked[0]), model)
    if not found.is_bracketed:
        raise typer.Exit(1)


def _tried(
    setup: Setup,
    vector: SteeringVector,
    scorer: Scorer,
    column: str,
    ends: tuple[float, float],
    each: int,
    seed: int,
    step: Callable[[str], None],
) -> Callable[[float], float]:
    """The mean score of the next prompts at a strength, from 0 to 1."""
    from steerkit.errors import DataError
    from steerkit.evaluate.scorers._base import Weighted
    from steerkit.evaluate.scoring import scores_of

    assert setup.prompts is not None
    prompts, order = setup.prompts, list[int]()
    shuffled = random.Random(seed)  # an order of prompts is no secret

    def score(strength: float) -> float:
        while len(order) < each:
            order.extend(shuffled.sample(range(len(prompts)), len(prompts)))
        some, order[:each] = [prompts[place] for place in order[:each]], []
        step(f"strength {strength:.3g}")
        given = scores_of(replace(setup, prompts=some).trial(vector, strength), scorer)[column]
        given_values = given.values if isinstance(given, Weighted) else given
        values = given_values[given_values.isfinite()]
        if not len(values):
            raise DataError(f"{column}: no text could be scored at strength {strength:.3g}; lower the highest strength")
        value = (float(values.double().mean()) - ends[0]) / (ends[1] - ends[0])
        if not 0.0 <= value <= 1.0:
            raise DataError(
                f"{column}: {value * (ends[1] - ends[0]) + ends[0]:.3g} at strength {strength:.3g} is beyond the scale "
                f"from {ends[0]:g} to {ends[1]:g}; give --scale LOW,HIGH"
            )
        return value

    return score


def _asked(prompts: Path | None) -> list[Conversation]:
    """The prompts that are answered."""
    from steerkit.prompts.conversation import Conversation
    from steerkit.prompts.files.prompts import read_prompts
    from steerkit.prompts.neutral import neutral_texts

    if prompts is None:
        return [Conversation(one.prompt) for one in neutral_texts()]
    return read_prompts(prompts)


def _column(scorer: Scorer, column: str | None) -> str:
    """The name of the figure that is looked at.

    Raises:
        BadParameter: the scorer has none of that name.
    """
    names = list(scorer.columns)
    if column is not None and column not in names:
        raise typer.BadParameter(f"--column: {scorer.name} has no {column!r}; it has {', '.join(names)}")
    return names[0] if column is None else column


def _only(scorers: Sequence[Scorer]) -> Scorer:
    """The scorer that was asked for.

    Raises:
        BadParameter: an option of another one was given.
    """
    scorer, *others = scorers
    if others:
        option = "--markers" if others[0].name == "markers" else "--judge and --behaviour"
        raise typer.BadParameter(f"--scorer: {scorer.name} takes no {option}; say --scorer {others[0].name}")
    return scorer


def _ends(scale: str | None, scorer: Scorer) -> tuple[float, float]:
    """Which scores are 0 and 1.

    Raises:
        BadParameter: the lower one does not come first.
    """
    if scale is not None:
        low, high = _two(scale, "--scale")
        if low > high:
            raise typer.BadParameter(f"--scale: {scale!r}; give the lower end first, such as 0,10")
        return low, high
    if scorer.name == "concept":
        return 0.0, 2.0
    return float(getattr(scorer, "low", 0.0)), float(getattr(scorer, "high", 1.0))


def _two(text: str, option: str) -> tuple[float, float]:
    """Two different numbers.

    Raises:
        BadParameter: they are not two, or they are one.
    """
    found = numbers([text], option)
    if len(found) != 2 or found[0] == found[1]:
        raise typer.BadParameter(f"{option}: {text!r}; give two numbers, such as 0,10")
    return found[0], found[1]


def _show_usage(found: FoundStrength, written: Path | None, vector: str, question: str, model: ModelChoice) -> None:
    if written is not None:
        typer.echo(f"wrote {written}")
    if found.is_bracketed:
        usage = usage_line(question, vector if written is None else str(written), strength=found.strength, model=model)
        typer.echo(f"use it:\n  {usage}")


def _show(found: FoundStrength, column: str) -> None:
    """Every try, and what they say together."""
    shown = table("try", "strength", f"mean {column}", "", "sure", right=("try", "strength", f"mean {column}", "sure"))
    for count, one in enumerate(found.tries, start=1):
        way = "higher" if one.is_higher else "lower"
        shown.add_row(str(count), f"{one.strength:.3g}", number(one.score, ".3f"), way, f"{one.probability:.0%}")
    console = stdout()
    console.print(shown)
    if not found.is_bracketed:
        side = "at least" if found.tries[0].score >= found.target else "below"
        console.print(f"every score is {side} {found.target:g}: it may not be crossed here; give other ends")
        return
    console.print(
        f"{column} crosses {found.target:g} at strength {found.strength:.3g} "
        f"({found.level:.0%} interval {found.low:.3g} to {found.high:.3g})"
    )
