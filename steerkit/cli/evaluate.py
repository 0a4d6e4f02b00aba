"""`steerkit evaluate`: what a vector does and what it costs, beside its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.json_values import jsonable
from steerkit._support.progress import status
from steerkit.cli._data import NO_DATA, DataChoice, takes_data
from steerkit.cli._evaluate_doubts import RefitIntervals, check_refits, doubted, show_doubts
from steerkit.cli._evaluate_steering import evaluate_steering
from steerkit.cli._evidence import (
    Behaviour,
    Judge,
    Markers,
    check_way,
    columns_table,
    data_of,
    numbers,
    scorers_of,
)
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._processes import shares_work
from steerkit.cli._prompting import prompting_json, show_prompting, systems_for
from steerkit.cli._shared import (
    BatchSize,
    Json,
    Unit,
    number,
    print_json,
    stdout,
    table,
)
from steerkit.cli._steering import SteeringOption

if TYPE_CHECKING:
    from steerkit.evaluate.prompting import Prompting
    from steerkit.evaluate.refit_results import Refits
    from steerkit.evaluate.scorers._base import Scorer
    from steerkit.evaluate.scoring import Measured
    from steerkit.evaluate.setup import Setup
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]


VectorOption = Annotated[
    str | None, typer.Option(metavar="FILE", help="A vector file, a shipped name, or hub:USER/NAME.")
]
PromptsOption = Annotated[
    str | None, typer.Option(metavar="FILE", help="What texts are generated from. (default: the data's prompts)")
]
StrengthOption = Annotated[
    list[str] | None, typer.Option(help="Repeatable, or 0.5,1,2. (default: the file's suggested strength)")
]
ScorerOption = Annotated[
    list[str] | None, typer.Option(help="Repeatable. (default: preference_margin, divergence, repetition)")
]
PromptingOption = Annotated[
    bool, typer.Option("--prompting", help="Measure the recipe's system prompts too, alone and under the vector.")
]
SystemOption = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="The same for a system prompt of yours; repeatable.")
]


@shares_work
@loads_model
@takes_data
def run(
    vector: VectorOption = None,
    steering: SteeringOption = None,
    given: DataChoice = NO_DATA,
    prompts: PromptsOption = None,
    strength: StrengthOption = None,
    unit: Annotated[Unit | None, typer.Option(help="What strengths count in. (default: the file's)")] = None,
    scope: Annotated[str | None, typer.Option(help="Tokens written. (default: the file's)")] = None,
    scorer: ScorerOption = None,
    markers: Markers = None,
    behaviour: Behaviour = None,
    judge: Judge = None,
    prompting: PromptingOption = False,
    system: SystemOption = None,
    controls: Annotated[int, typer.Option(min=0, help="Random directions, and fits on shuffled labels.")] = 5,
    texts: Annotated[int, typer.Option(min=1, help="Prompts answered at the most.")] = 16,
    neutral: Annotated[int, typer.Option(min=1, help="Neutral texts that costs are measured on.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 40,
    refit_intervals: RefitIntervals = 0,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Measure what a vector does and what it costs: with intervals, against the unsteered model, beside controls.

    Measured on held-out items of its recipe, or on your own pairs with both answers (--data). Controls: random
    directions of the same norm, fits on shuffled labels, how stable the direction is, and whether length, position or
    format alone predicts the label. With --prompting the recipe's (or trait's) system prompts are measured on the same
    items, every wording alone and under the vector at its largest strength: one more measurement each.

    A composition (--steering) is measured as it stands, on --data or --prompts; no controls are made of it.
    """
    from steerkit._support.shipped import vector_path
    from steerkit.evaluate.setup import Setup
    from steerkit.methods._registry import default_strength
    from steerkit.vector.steering_vector import SteeringVector

    given.check(is_read=prompts is not None)
    scorers = scorers_of(scorer, markers, behaviour, judge)
    sizes: dict[str, Any] = {"batch_size": batch_size, "texts": texts, "max_new_tokens": max_new_tokens}
    if steering is not None or vector is None:
        alone: dict[str, Any] = {"vector": vector, "strength": strength, "unit": unit, "scope": scope}
        alone |= {"prompting": prompting, "system": system, "refit-intervals": refit_intervals}
        evaluate_steering(steering, alone, given, prompts, scorers, {**sizes, "neutral": neutral}, model, as_json)
        return
    loaded_vector = SteeringVector.load(vector_path(vector, model.name))
    strengths = numbers(strength, "--strength") or [default_strength(loaded_vector)]
    way: dict[str, Any] = {"scope": scope, "unit": None if unit is None else unit.value}
    check_way(loaded_vector, **way, has_strength=bool(strength))
    train, held_out, asked = _items(vector, loaded_vector, given, prompts)
    check_refits(vector, train, refit_intervals)
    if held_out is None and scorer is None:
        scorers = [one for one in scorers if one.name != "preference_margin"]
    strongest = max(strengths, key=abs)
    systems = systems_for(loaded_vector, system, strongest) if prompting or system else ()
    loaded, tokenizer = model.load()
    loaded_vector.check(loaded, tokenizer)
    setup = Setup(loaded, tokenizer, held_out, prompts=asked, **sizes).first_neutral(neutral)
    with status("measuring") as step:
        evaluation = _Evaluation(setup, loaded_vector, way, strengths, scorers, controls, train)
        found = evaluation.run(step)
        found |= doubted(evaluation, found["control"]["strength"], refit_intervals, step)
        beside = evaluation.asked(systems, strongest, step)
        found |= prompting_json(beside)
    if as_json:
        print_json(jsonable({"vector": vector, "digest": loaded_vector.digest, **found}))
        return
    _show(vector, evaluation.measured, found)
    show_prompting(vector, strongest, beside)


def _items(
    name: str, vector: SteeringVector, given: DataChoice, prompts: str | None
) -> tuple[ContrastSet | None, ContrastSet | None, list[Any] | None]:
    """What the vector was fitted on, what it is measured on, and what is answered, as far as that is known.

    Raises:
        DataError: there is nothing to measure on.
    """
    from steerkit.errors import DataError

    train, held_out = data_of(vector, given)
    asked = None if prompts is None else given.prompts(prompts)
    if held_out is None and asked is None:
        raise DataError(f"{name}: its recipe's held-out items are not known here; give --data or --prompts")
    return train, held_out, asked


class _Evaluation:
    """Everything the command measures."""

    def __init__(
        self,
        setup: Setup,
        vector: SteeringVector,
        way: dict[str, Any],
        strengths: list[float],
        scorers: list[Scorer],
        controls: int,
        train: Any,
    ) -> None:
        self.setup, self.vector, self.way, self.strengths = setup, vector, way, strengths
        self.scorers, self.controls, self.train = scorers, controls, train
        self.measured: list[dict[str, Measured]] = []

    def run(self, step: Any) -> dict[str, Any]:
        """Figures at every strength, then the controls at the strongest."""
        from steerkit.evaluate.scoring import measure

        found: dict[str, Any] = {"unit": self.way["unit"] or self.vector.unit, "strengths": []}
        trials = self.setup.trials(((self.vector, strength) for strength in self.strengths), **self.way)
        for strength, trial in zip(self.strengths, trials, strict=True):
            step(f"strength {strength:g}")
            measured = measure(trial, self.scorers)
            found["strengths"].append({"strength": strength, "scores": {n: m.as_row() for n, m in measured.items()}})
            self.measured.append(measured)
        strongest = max(self.strengths, key=abs)
        first = next(iter(self.scorers[0].columns))
        refitted = self.refits(step)
        found["control"] = {
            "column": first,
            "strength": strongest,
            "effect": self.measured[self.strengths.index(strongest)][first].estimate.mean,
            "random": self.effects(self.randoms(), strongest, step, "random direction"),
            "shuffled": self.effects(refitted.matched() if refitted else (), strongest, step, "shuffled labels"),
        }
        found["direction"] = None if refitted is None else refitted.as_json()
        found["warnings"] = self.warnings()
        return found

    def asked(self, systems: Sequence[str], strongest: float, step: Any) -> dict[str, Prompting]:
        """Every system prompt, alone and with the vector on top; nothing where there is none."""
        from steerkit.evaluate.prompting import measure_prompting

        if not systems:
            return {}
        vector = replace(
            self.vector, scope=self.way["scope"] or self.vector.scope, unit=self.way["unit"] or self.vector.unit
        )
        common: dict[str, Any] = {"scorers": self.scorers, "step": lambda: step("system prompts")}
        return {
            "alone": measure_prompting(self.setup, systems, **common),
            "with_vector": measure_prompting(self.setup, systems, vector=vector, strength=strongest, **common),
        }

    def randoms(self) -> list[SteeringVector]:
        """Vectors with nothing learned in them."""
        from steerkit.evaluate.curve import random_like

        return [random_like(self.vector, seed=1 + number) for number in range(self.controls)]

    def refits(self, step: Any) -> Refits | None:
        """The method fitted again on rearranged items, where they are known."""
        from steerkit.evaluate.controls import refits

        if self.train is None or not self.controls:
            return None
        step("fits on rearranged items")
        setup = self.setup
        return refits(
            setup.model,
            setup.tokenizer,
            self.train,
            self.vector,
            shuffled=self.controls,
            batch_size=setup.batch_size,
        )

    def effects(self, vectors: Any, strength: float, step: Any, note: str) -> list[float]:
        """The first figure under each of some control vectors."""
        from steerkit.evaluate.scoring import measure

        first = self.scorers[0]
        means = []
        for trial in self.setup.trials(((control, strength) for control in vectors), **self.way):
            step(note)
            scores: dict[str, Measured] = measure(trial, [first])
            means.append(next(iter(scores.values())).estimate.mean)
        return means

    def warnings(self) -> list[str] | None:
        """What else than the behaviour tells the two sides apart; None where no two sides are known."""
        from steerkit.evaluate.confounding import confounds

        data = self.train if self.train is not None else self.setup.data
        if data is None:
            return None
        found = confounds(self.setup.tokenizer, data, readout=self.vector.readout)
        return [one.message for one in found if one.warns]


def _show(name: str, figures: list[dict[str, Measured]], found: dict[str, Any]) -> None:
    console = stdout()
    for one, measured in zip(found["strengths"], figures, strict=True):
        console.print(f"{name} at strength {one['strength']:g}", soft_wrap=True)
        console.print(columns_table(measured))
    control = found["control"]
    shown = table("", "from", "to", "n", right=("from", "to", "n"))
    for kind, label in (("random", "random directions, same norm"), ("shuffled", "fits on shuffled labels, same norm")):
        if control[kind]:
            low, high = min(control[kind]), max(control[kind])
            shown.add_row(label, f"{low:+.3f}", f"{high:+.3f}", str(len(control[kind])))
    if shown.row_count:
        console.print(_title(control))
        console.print(shown)
    same = (found["direction"] or {}).get("shuffled_on_the_same_axis", 0)
    if same:
        typer.echo(f"{same} fits on shuffled labels left out: this method finds its axis without labels")
    _show_direction(found["direction"])
    for warning in found["warnings"] or ():
        console.print(f"warning: {warning}")
    if found["warnings"] == []:
        typer.echo("neither length, position nor format alone predicts the label")
    show_doubts(found)


def _title(control: dict[str, Any]) -> str:
    return f"{control['column']} at strength {control['strength']:g} is {control['effect']:+.3f}; controls reach"


def _show_direction(direction: dict[str, Any] | None) -> None:
    """How stable the direction is when the items it was fitted on change."""
    if direction is None or "sites" not in direction:
        return
    columns = ("site", "split-half cosine", "bootstrap cosine (2.5 %)")
    shown = table(*columns, right=columns[1:])
    for site, found in direction["sites"].items():
        half, again = found.get("split_half", {}), found.get("bootstrap", {})
        lowest = number(again.get("cosine_low"), ".3f")
        shown.add_row(site, number(half.get("mean"), ".3f"), f"{number(again.get('cosine'), '.3f')} ({lowest})")
    typer.echo("the direction, fitted again on other items")
    stdout().print(shown)
