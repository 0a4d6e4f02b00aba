"""Traps that make a broken run look good: a generation or a judge's call that fails, a figure that nobody measured.

An item that could be scored without steering and not with it never improves a score; a cost that was not measured is no
cost of 0, and keeps inside no budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from steerkit.errors import DataError, SteerError
from steerkit.evaluate.calibration import Budget, Search, calibrate
from steerkit.evaluate.calibration.verdict import Verdict, judged, unfound
from steerkit.evaluate.intervals import Estimate, NotScored, too_few
from steerkit.evaluate.joint_effect import effects_of
from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.scoring import Measured, measure, scorer_names, scorer_of
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.sweeps import Point
from steerkit.evaluate.trial import Answer, Trial
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from tests import modes
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*alone predicts the label")

ITEMS = [(f"And day {n}, how was it?", f"It was a fine day, {n}.", f"It was a bleak {n}!") for n in range(8)]
CALM = [Conversation(f"What is {n} and {n}?", answer=f"It is {2 * n}, as ever.") for n in range(8)]


class Judge:
    """Gives 6 of 10, and nothing to an empty answer or to those it is told to fail on."""

    name = "judge"

    def __init__(self, fails: Callable[[str], bool] = lambda prompt: False) -> None:
        self.fails = fails

    def score(self, prompts: Sequence[str], *, low: int = 0, high: int = 10) -> list[float | None]:
        number = low + 0.6 * (high - low)
        return [None if "> \n" in prompt or self.fails(prompt) else number for prompt in prompts]


SETTINGS: dict[str, dict[str, Any]] = {
    "judge": {"judge": Judge(), "behaviour": "cheer"},
    "concept": {"judge": Judge(), "behaviour": "cheer"},
    "markers": {"markers": ("the", "a", "is")},
}


@pytest.fixture(scope="module")
def setup() -> Setup:
    data = ContrastSet.from_answers(ITEMS)
    return Setup(build("llama"), byte_tokenizer(CHATML), data, neutral=CALM, max_new_tokens=3)


@pytest.fixture
def failing(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """A trial that changes nothing, but whose every second generation is empty and every second pass not a number."""
    passes, record = Trial._passes, Trial.record

    def texts(trial: Trial, prompts: Sequence[Conversation], **_options: Any) -> tuple[str, ...]:
        found = ("It is a fine day and a fine night.",) * len(prompts)
        return found if trial.vector is None else tuple("" if row % 2 else text for row, text in enumerate(found))

    def passed(trial: Trial, *asked: Any) -> Iterator[tuple[Trial, Answer]]:
        for member, one in passes(trial, *asked):
            bad = member.vector is not None and one.row // 2 % 2
            yield member, one._replace(logits=torch.full_like(one.logits, math.nan)) if bad else one

    def recorded(trial: Trial, rendered: Any, sites: Any, *, readout: Any) -> Any:
        found = record(trial, rendered, sites, readout=readout)
        for site in sites if trial.vector is not None else ():
            found[site][1::2] = math.nan
        return found

    monkeypatch.setattr(Trial, "answered", texts)
    monkeypatch.setattr(Trial, "_passes", passed)
    monkeypatch.setattr(Trial, "record", recorded)
    return replace(setup).trial(modes.vector_for(setup.model, scope="response"), 0.0)


@pytest.mark.parametrize("name", scorer_names())
def test_what_fails_improves_no_score(failing: Trial, name: str) -> None:
    try:
        scores = measure(failing, [scorer_of(name, SETTINGS.get(name))])
    except NotScored:  # every item needs a pass that failed: no figure at all
        return
    for column, found in scores.items():
        assert not found.gain.low > 0, column
        assert not found.gain.mean > 1e-6, column
        if found.lost and found.column.better != "neither":
            assert found.gain.low == -math.inf, "the others say nothing of what was lost"


@pytest.mark.parametrize("name", ["repetition", "judge", "concept"])
def test_what_fails_counts_as_the_worst_there_is(failing: Trial, name: str) -> None:
    found = next(iter(measure(failing, [scorer_of(name, SETTINGS.get(name))]).values()))
    worst = {"repetition": 1.0, "judge": 0.0, "concept": 0.0}[name]
    others = {"repetition": 0.0, "judge": 6.0, "concept": 1.2}[name]
    assert found.estimate.mean == pytest.approx((worst + others) / 2)
    assert (found.failures, found.lost) == (0, 0)


def test_an_item_that_never_could_be_scored_counts_nowhere() -> None:
    class Half(Scorer):
        name, title = "half", "half"
        columns: ClassVar = {"half": Column("half", "", "higher", worst=0.0)}

        def score(self, trial: Trial) -> dict[str, Tensor]:
            without, steered = [1.0, math.nan, math.nan, 1.0], [2.0, math.nan, 3.0, math.nan]
            return {"half": torch.tensor(without if trial.vector is None else steered)}

    setup = Setup(torch.nn.Identity(), byte_tokenizer(CHATML))
    found = measure(setup.trial(modes.vector_for(build("llama"), scope="response"), 1.0), [Half()])["half"]
    assert found.estimate.mean == pytest.approx(5 / 3), "2, 3, and 0 for what was lost; the second item has no figure"
    assert found.change is not None
    assert found.change.mean == pytest.approx(0.0), "+1 and -1: the third has nothing to be compared with"


def test_a_judge_that_fails_on_steered_answers_alone_gains_nothing(setup: Setup) -> None:
    """Dropping what could not be judged would leave the good answers."""
    steered = setup.trial(modes.vector_for(setup.model, scope="response"), 1.0)
    vars(steered)["texts"] = tuple("awful" if n % 2 else "great" for n in range(8))
    plain = replace(setup)
    vars(plain.baseline)["texts"] = ("fine",) * 8
    trial = replace(steered, setup=plain)
    vars(trial)["texts"] = vars(steered)["texts"]

    class Kind(Judge):
        def score(self, prompts: Sequence[str], *, low: int = 0, high: int = 10) -> list[float | None]:
            return [None if "awful" in prompt else 9.0 if "great" in prompt else 5.0 for prompt in prompts]

    found = measure(trial, [scorer_of("judge", {"judge": Kind(), "behaviour": "cheer"})])["judged"]
    assert found.estimate.mean == pytest.approx(4.5), "9 and 0, not 9"
    assert not found.gain.mean > 0


def test_a_judge_that_breaks_off_leaves_no_figure(setup: Setup) -> None:
    class Broken(Judge):
        def score(self, prompts: Sequence[str], *, low: int = 0, high: int = 10) -> list[float | None]:
            raise SteerError("the endpoint is gone")

    trial = replace(setup).trial(modes.vector_for(setup.model, scope="response"), 0.1)
    scorer = scorer_of("judge", {"judge": Broken(), "behaviour": "cheer"})
    with pytest.raises(SteerError, match="the endpoint is gone"):
        measure(trial, [scorer])
    assert not trial.setup.scored


def test_vectors_together_gain_nothing_by_falling_silent(failing: Trial) -> None:
    vectors = {
        name: modes.vector_for(failing.setup.model, seed=seed, scope="response").at(0.0)
        for seed, name in enumerate("ab")
    }
    (found, _) = effects_of("own", failing.setup, vectors, None, scorer_of("repetition"), 0)
    assert found.joint.mean == pytest.approx(0.5), "half of the texts are empty"
    assert found.failures == 0


# ---- budgets


def figure(mean: float, *, lost: int = 0, items: int = 28, half: float = 0.01) -> Measured:
    return Measured(Column("", "", "higher"), Estimate(mean, mean - half, mean + half), None, items, lost, lost)


INSIDE = {"kl": figure(0.1), "perplexity_ratio": figure(1.1), "repetition": figure(0.0)}


@pytest.mark.parametrize("cost", sorted(INSIDE))
def test_a_cost_that_was_not_measured_is_inside_no_budget(cost: str) -> None:
    budget = Budget()
    assert budget.breaks(INSIDE, due=INSIDE) == []
    without = {name: one for name, one in INSIDE.items() if name != cost}
    assert any("was not measured" in one for one in budget.breaks(without, due=INSIDE))
    partly = {**INSIDE, cost: figure(0.0, lost=1)}
    assert any("could not be measured on 1 of 29 texts" in one for one in budget.breaks(partly))
    assert budget.breaks({**INSIDE, cost: figure(math.nan)})


def test_costs_of_texts_fall_due_only_where_texts_are_read() -> None:
    assert Budget().breaks({name: one for name, one in INSIDE.items() if name != "repetition"}) == []
    assert Budget().breaks({}), "the costs of every strength"


@pytest.mark.parametrize("missing", ["kl", "perplexity_ratio", "repetition"])
def test_calibrate_chooses_nothing_whose_cost_is_unknown(
    missing: str, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def table(_setup: Any, _vector: Any, strength: float, scorers: Any, **_: Any) -> dict[str, Measured]:
        figures = {"preference_margin": figure(strength), **INSIDE}
        wanted = [column for scorer in scorers for column in scorer.columns]
        return {name: one for name, one in figures.items() if name in wanted and name != missing}

    monkeypatch.setattr("steerkit.evaluate.calibration.problem.measure_point", table)
    found = calibrate(
        setup,
        ContrastSet.from_answers([(f"Day {n}?", f"Kind, {n}.", f"Grim, {n}.") for n in range(24)]),
        readout="response_mean",
        search=Search(candidates=[(1,)], strengths=(0.5, 1.0), controls=1, neutral_texts=2),
    )
    assert found.strength is None
    assert not found.works


@pytest.mark.parametrize("missing", ["kl", "perplexity_ratio", "repetition"])
def test_nothing_is_confirmed_whose_cost_is_unknown(missing: str) -> None:
    confirmed = {"preference_margin": figure(1.0), **INSIDE}
    assert judged("preference_margin", Budget(), confirmed, [0.0]).works
    del confirmed[missing]
    found = judged("preference_margin", Budget(), confirmed, [0.0])
    assert not found.works
    assert "was not measured" in found.words


def test_without_controls_nothing_is_clear_of_them() -> None:
    assert not judged("preference_margin", Budget(), {"preference_margin": figure(1.0), **INSIDE}, []).works


# ---- too few items


@pytest.mark.parametrize(
    ("gain", "items", "over", "expected"),
    [
        (Estimate(0.1, -0.3, 0.5), 8, 0.0, True),
        (Estimate(0.01, -0.02, 0.04), 400, 0.0, False),
        (Estimate(0.5, 0.2, 0.8), 8, 0.0, False),
        (Estimate(0.5, 0.2, 0.8), 8, 0.3, True),
        (Estimate(-0.5, -0.8, -0.2), 8, 0.0, False),
        (Estimate(0.1, -math.inf, math.inf), 1, 0.0, True),
    ],
)
def test_too_few_is_said_of_the_interval_and_not_of_the_effect(
    gain: Estimate, items: int, over: float, *, expected: bool
) -> None:
    assert too_few(gain, items, over=over) is expected


def test_the_verdict_of_a_calibration_says_which_it_is() -> None:
    def said(one: Measured, control: float = 0.0) -> Verdict:
        return judged("preference_margin", Budget(), {"preference_margin": one, **INSIDE}, [control])

    def words(one: Measured, control: float = 0.0) -> str:
        return said(one, control).words

    # What few items leave open keeps the strength that was chosen; what many items show to be nothing does not.
    assert said(figure(0.1, half=0.4, items=8)).suggests
    assert said(figure(0.5, half=0.02, items=400)).suggests
    assert not said(figure(0.001, half=0.02, items=400)).suggests
    assert not said(figure(0.5, half=0.02, items=400), 0.5).suggests
    assert words(figure(0.1, half=0.4, items=8)).startswith("too few items to tell")
    assert words(figure(0.001, half=0.02, items=400)).startswith("nothing works")
    assert words(figure(0.5, half=0.3, items=8), 0.4).startswith("too few items to tell")
    assert "not clear of a control's 0.5" in words(figure(0.5, half=0.02, items=400), 0.5)


def test_an_effect_that_the_budget_forbids_is_named() -> None:
    class Problem:
        effect, budget = "preference_margin", Budget()
        gain = staticmethod(lambda point: point.scores["preference_margin"].gain)
        reach = staticmethod(abs)

    def point(strength: float, kl: float, effect: float) -> Point:
        return Point((1,), strength, {**INSIDE, "kl": figure(kl), "preference_margin": figure(effect, items=400)})

    found = unfound(Problem(), [point(1.0, 0.42, 0.3), point(2.0, 0.9, 0.5)])  # type: ignore[arg-type]
    assert found.endswith("inside the budget; there is one at strength 1, but KL 0.42 over 0.3")
    found = unfound(Problem(), [point(1.0, 0.1, -0.3), point(2.0, 0.9, -0.5)])  # type: ignore[arg-type]
    assert found == "nothing works: no layer and strength tried has a positive effect inside the budget"
    few = Point((1,), 1.0, {**INSIDE, "preference_margin": figure(0.1, half=0.4, items=8)})
    found = unfound(Problem(), [few])  # type: ignore[arg-type]
    assert found.startswith("too few items to tell: at layer 1 at strength 1 preference_margin changes by 0.1")


def test_a_model_that_says_nothing_finite_has_no_figure(setup: Setup) -> None:
    trial = setup.trial(modes.vector_for(setup.model, scope="response"), 1e38)
    with pytest.raises((NotScored, DataError)):
        measure(trial, ["divergence"])
