"""Successive halving: the same choice as measuring everything on all items, in fewer rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from steerkit._support.shipped import recipes
from steerkit.errors import DataError
from steerkit.evaluate.calibration import search as module
from steerkit.evaluate.calibration.budget import Budget, Search
from steerkit.evaluate.calibration.choosing import Choosing, survivors
from steerkit.evaluate.calibration.problem import Problem
from steerkit.evaluate.calibration.result import Calibration
from steerkit.evaluate.calibration.search import calibrate
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.scorers._base import Column
from steerkit.evaluate.scoring import Measured
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store import Store
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.recipe.finding import find_recipe
from tests.looping import NEUTRAL, looping_model, trait_data

# The items of these tests differ in their answers alone; formal words are longer ones and refusals say "I".
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is fitted on as well"),
    pytest.mark.filterwarnings("ignore:.*predicts the label"),
]

FREE = Budget(max_kl=1e9, max_ppl_ratio=1e30, max_repetition=0.1)
SEARCH = Search(
    candidates=[(0,), (1,), (2,), (3,)], strengths=(0.5, 1.0, 1.9, 2.5), controls=1, neutral_texts=2, screened_items=8
)


class Rows:
    """Counts the rows of a model's passes."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: nn.Module, _args: Any, inputs: Any) -> None:
        self.count += inputs["input_ids"].numel()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def found(search: Search) -> tuple[Calibration, int]:
    """A calibration, and the tokens that went through the model for it."""
    model, tokenizer = looping_model()
    setup = Setup(model, tokenizer, trait_data(8, seed=9), neutral=NEUTRAL, texts=2, max_new_tokens=16)
    with Rows(model) as rows:
        return calibrate(setup, trait_data(96), readout="response_mean", budget=FREE, search=search), rows.count


@pytest.mark.slow
def test_the_same_choice_in_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    halved, few = found(SEARCH)
    monkeypatch.setattr(Problem, "rungs", property(lambda problem: [problem.setup]))
    full, many = found(SEARCH)
    assert (halved.layers, halved.strength) == (full.layers, full.strength)
    for name in ("chosen", "confirmed"):
        mine, other = getattr(halved, name), getattr(full, name)
        assert mine.keys() == other.keys()
        for column in mine:
            assert mine[column].items == other[column].items
            assert math.isclose(mine[column].estimate.mean, other[column].estimate.mean, rel_tol=1e-4, abs_tol=1e-4)
    assert few < 0.9 * many
    items = {point.scores["preference_margin"].items for point in halved.points}
    assert min(items) < max(items) == 24, "what was clearly behind was not measured on all"


def with_sources(data: ContrastSet) -> ContrastSet:
    sources = tuple("book" if place % 2 == 0 else "letter" for place in range(len(data)))
    topics = tuple(map(str, range(len(data))))
    return replace(data, origins=(sources, sources), topics=(topics, topics))


def test_items_with_sources_and_topics_are_screened_on_few_of_them() -> None:
    model, tokenizer = looping_model()
    train, held_out = (with_sources(data) for data in (trait_data(96), trait_data(8, seed=9)))
    setup = Setup(model, tokenizer, held_out, neutral=NEUTRAL, texts=2, max_new_tokens=16)
    few = setup.first(3, 4).data
    assert few is not None
    assert few.origins == (("book", "letter", "book"), ("book", "letter", "book"))
    assert few.topics == (("0", "1", "2"), ("0", "1", "2"))
    search = replace(SEARCH, candidates=[(1,), (2,)], strengths=(0.5, 1.0))
    assert calibrate(setup, train, readout="response_mean", budget=FREE, search=search).points


def test_items_that_the_effect_cannot_be_told_of_are_refused_before_anything_runs() -> None:
    model, tokenizer = looping_model()
    train, held_out = (
        ContrastSet.from_prompts([f"good {n} {part}" for n in range(12)], [f"bad {n} {part}" for n in range(12)])
        for part in ("to fit on", "held out")
    )
    with Rows(model) as rows, pytest.raises(DataError, match="give both answers, or another scorer"):
        calibrate(Setup(model, tokenizer, held_out, neutral=NEUTRAL), train, readout="prompt_last")
    assert rows.count == 0


def test_only_what_is_clearly_behind_is_left_out() -> None:
    intervals = {"a": Estimate(3, 2, 4), "b": Estimate(2.5, 1, 5), "c": Estimate(1.5, 1, 2), "d": Estimate(1, 0, 1.9)}
    assert survivors(intervals, 1) == ["a", "b", "c"]
    assert survivors(intervals, 2) == ["a", "b", "c", "d"]
    assert survivors({"d": intervals["d"], "a": intervals["a"]}, 1) == ["a"]
    assert survivors({}, 1) == []


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 0.2, True), (0.4, 0.6, False), (0.2, 0.4, None), (0.29, math.inf, None)]
)
def test_a_budget_is_held_where_the_whole_interval_says_so(low: float, high: float, verdict: bool | None) -> None:
    kl = Measured(Column("", ""), Estimate(0.5 * low + 0.5 * min(high, 1.0), low, high), None, 6)
    ratio = Measured(Column("", ""), Estimate(1.1, 1.0, 1.2), None, 6)
    assert Budget().holds({"kl": kl, "perplexity_ratio": ratio}) is verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(recipes()))
def test_the_same_winner_on_every_shipped_recipe(
    name: str, embedded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if every set of layers climbed from the bottom of the ladder, and all were measured on all items."""
    model, tokenizer = embedded
    recipe = find_recipe(name)
    part = recipe.method_part()
    train, held_out = recipe.split(part.name)
    if any(one.answer is None for one in held_out.positive):
        pytest.skip("requests without answers: gates are placed by `steerkit gates`")
    setup, store = Setup(model, tokenizer, held_out, texts=4), Store()
    # Only what is chosen is compared, so nothing is confirmed.
    monkeypatch.setattr(module, "confirm", lambda _problem, best, _choosing: best)

    def chosen() -> tuple[Any, Any]:
        search = Search(candidates=recipe.candidates(setup.decoder.num_layers, part.name))
        best = calibrate(
            replace(setup, texts=4),
            train,
            method=part.name,
            settings=dict(part.settings),
            readout=part.readout,
            scope=recipe.apply.scope,
            validation=recipe.validation(part.name),
            kinds=recipe.kinds(part),
            search=search,
            store=store,
        )
        return best.layers, best.strength

    halved = chosen()
    monkeypatch.setattr(Problem, "rungs", property(lambda problem: [problem.setup]))
    monkeypatch.setattr(Choosing, "climb", from_the_bottom)
    assert halved == chosen()


def from_the_bottom(choosing: Choosing, layers: tuple[int, ...]) -> list[Any]:
    """Every strength inside the budget, up to the first that exceeds it."""
    return choosing._inside([(layers, strength) for strength in choosing._problem.ladder])
