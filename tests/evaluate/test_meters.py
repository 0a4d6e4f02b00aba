"""Meters of damage and doubt against their definitions, one token, pair and draw at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.errors import DataError
from steerkit.evaluate.answer_likeness import answer_likeness, ches
from steerkit.evaluate.controls import read_again
from steerkit.evaluate.intervals import NotScored
from steerkit.evaluate.rearranged import RearrangedRows
from steerkit.evaluate.refit_intervals import refit_interval
from steerkit.evaluate.removal import probe_after_removal, removes
from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.scorers.collapse import Collapse, mean_cosine
from steerkit.evaluate.scorers.preference_margin import PreferenceMargin
from steerkit.evaluate.scoring import Measured, measure
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.trial import Trial
from steerkit.maths.probes import auc, linear_probe
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from tests import tolerances
from tests.by_hand import blocks_of, stream_of
from tests.families import BLOCKS, build
from tests.modes import vector_for
from tests.tiny_tokenizers import CHATML, byte_tokenizer

ITEMS = [(f"Is {n} good?", f"Yes, {n} is a joy{'!' * (n % 3)}", f"No, {n} is pain{'.' * (n % 4)}") for n in range(16)]
TRAIN, HELD_OUT = (ContrastSet.from_answers(part) for part in (ITEMS[:10], ITEMS[10:]))


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup(build("llama"), byte_tokenizer(CHATML), HELD_OUT, max_new_tokens=6, texts=3)


# collapse


def slow_mean_cosine(rows: Tensor) -> float:
    cosines = [
        float(torch.dot(one, other) / (one.norm() * other.norm()))
        for i, one in enumerate(rows.double())
        for j, other in enumerate(rows.double())
        if i != j
    ]
    return sum(cosines) / len(cosines)


def test_mean_cosine_of_noise_is_about_0_and_of_a_common_shift_about_1() -> None:
    noise = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    assert mean_cosine(noise) == pytest.approx(slow_mean_cosine(noise), abs=1e-12)
    assert abs(mean_cosine(noise)) < 0.06  # standard deviation 0.019
    shifted = noise + 5.0
    assert mean_cosine(shifted) == pytest.approx(slow_mean_cosine(shifted), abs=1e-12)
    assert mean_cosine(shifted) == pytest.approx(0.96, abs=0.01)
    assert mean_cosine(torch.ones(3, 4)) == pytest.approx(1.0)
    assert math.isnan(mean_cosine(torch.ones(1, 4)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_collapse_reads_the_tokens_of_each_text_alone(family: str) -> None:
    setup = Setup(build(family), byte_tokenizer(CHATML), HELD_OUT, max_new_tokens=6, texts=2)
    trial = setup.trial(vector_for(setup.model, scope="response", size=0.5), 2.0)
    for one in (trial, setup.baseline):
        found = Collapse().score(one)["collapse"]
        for asked, text, value in zip(setup.asked, one.texts, found.tolist(), strict=True):
            shown = setup.render(replace(asked, answer=text))
            states: list[Tensor] = []
            with one.steering([shown.prompt_length]), torch.no_grad():
                handle = blocks_of(setup.model)[-1].register_forward_hook(
                    lambda _module, _args, output, states=states: states.append(stream_of(output)[0].clone())
                )
                setup.model(torch.tensor([list(shown.ids)]))
                handle.remove()
            assert value == pytest.approx(slow_mean_cosine(states[0][shown.prompt_length :]), abs=1e-5)


def test_a_text_that_steering_left_without_a_pair_of_tokens_is_collapsed(setup: Setup) -> None:
    trial = replace(setup.trial(vector_for(setup.model, scope="response"), 1.0))
    vars(trial)["texts"] = ("", "  ", "abcdef")
    found = measure(trial, ["collapse"])["collapse"]
    assert (found.items, found.failures) == (3, 0)
    assert found.estimate.mean > 2 / 3


# pairs whose answers are nearly one thing


def test_ches_is_its_definition() -> None:
    assert ches(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 0.0]])).total == -3.0
    same = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert ches(same, same).total == pytest.approx(0.0, abs=1e-12)
    # Read both ways round, per token, it is minus the squared distance of the means.
    other = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    both = ches(same, other).per_token + ches(other, same).per_token
    assert both == pytest.approx(-float((same.mean(0) - other.mean(0)).square().sum()), rel=1e-5)
    # Each row's own length: the same token said again changes the sum and not the mean.
    once, twice = torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    assert ches(once, twice).per_token == 0.0
    assert ches(once, twice).total == 9.0


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_read_behind_the_final_norm_whatever_the_batch(setup: Setup, batch_size: int) -> None:
    found = answer_likeness(replace(setup, batch_size=batch_size)).scores
    assert len(found) == len(HELD_OUT)
    for score, pair in zip(found, setup.pairs, strict=True):
        states = []
        for text in pair:
            out = setup.model.model(torch.tensor([list(text.ids)])).last_hidden_state[0].detach()
            states.append(out[text.prompt_length - 1 : len(text.ids) - 1])
        a, b = (one.double().sum(0) for one in states)
        own, other = map(len, states)
        assert score.total == pytest.approx(float(a @ b - a @ a), rel=1e-4, abs=1e-3)
        assert score.per_token == pytest.approx(
            float(a @ b) / (own * other) - float(a @ a) / own**2, rel=1e-4, abs=1e-4
        )


def test_equal_answers_are_the_most_alike(setup: Setup) -> None:
    data = ContrastSet.from_answers([("Well?", "No way.", "Yes!"), ("Well?", "Yes.", "Yes."), ("And?", "One", "Two")])
    found = answer_likeness(replace(setup, data=data))
    assert found.alike() == (1,)
    assert found.apart[1] == pytest.approx(0.0, abs=1e-9)
    assert found.alike(1e9)[0] == 1
    means = [
        setup.model.model(torch.tensor([list(text.ids)]))
        .last_hidden_state[0, text.prompt_length - 1 : -1]
        .mean(0)
        .detach()
        for pair in replace(setup, data=data).pairs
        for text in pair
    ]
    others = sorted(
        float((means[2 * i] - means[2 * j + 1]).square().sum()) for i in range(3) for j in range(3) if i != j
    )
    expected = float((means[0] - means[1]).square().sum()) / others[2]
    assert found.apart[0] == pytest.approx(expected, rel=1e-4)
    # One letter is read where it is foretold, at the prompt's last token, which both sides share.
    letters = ContrastSet.from_answers([("Well?", "Y", "N"), ("And?", "Yes", "No")])
    found = answer_likeness(replace(setup, data=letters))
    shared = replace(setup, data=letters).pairs[0][0]
    state = setup.model.model(torch.tensor([list(shared.ids)])).last_hidden_state[0, shared.prompt_length - 1].detach()
    rounding = tolerances.of_family("llama") * float(state @ state)
    assert found.scores[0].total == pytest.approx(0.0, abs=rounding)
    assert math.isnan(found.apart[0])
    assert found.alike() == ()
    with pytest.raises(DataError, match="pairs of answers are needed"):
        answer_likeness(replace(setup, data=None))


# share of items moved the wrong way


@dataclass(frozen=True)
class Given(Scorer):
    """Scores that are given."""

    after: tuple[float, ...] = ()
    before: tuple[float, ...] = ()
    steered: bool = True

    name: ClassVar[str] = "given"
    title: ClassVar[str] = "given"
    columns: ClassVar[Any] = {"given": Column("given", "points", "higher", steered=True)}

    def score(self, trial: Trial) -> dict[str, Tensor]:
        """Those."""
        return {"given": torch.tensor(self.after if trial.vectors else self.before)}


NAN = math.nan


@pytest.mark.parametrize(
    ("strength", "after", "expected"),
    [
        (1.0, (2.0, 0.5, 1.0, 3.0), 0.25),  # up, down, as it was, up
        (-1.0, (2.0, 0.5, 1.0, 3.0), 0.5),
        (1.0, (2.0, NAN, NAN, 3.0), 0.5),  # what could not be scored did not move as wished
        (-1.0, (2.0, NAN, NAN, 3.0), 1.0),
    ],
)
def test_items_moved_the_wrong_way(setup: Setup, strength: float, after: tuple[float, ...], expected: float) -> None:
    trial = setup.trial(vector_for(setup.model, scope="response"), strength)
    found = measure(trial, [Given(after, (1.0, 1.0, 1.0, 1.0))])["given"]
    assert found.wrong_way == expected
    assert Measured.from_row(found.column, found.as_row()) == found
    assert measure(trial, [Given((1.0,) * 4, (1.0, NAN, 1.0, 1.0))])["given"].wrong_way == 0.25


def test_no_sign_no_wrong_way(setup: Setup) -> None:
    vector = vector_for(setup.model, scope="response")
    assert measure(setup.baseline, ["preference_margin"])["preference_margin"].wrong_way is None
    assert measure(setup.trial(vector, 0.0), ["preference_margin"])["preference_margin"].wrong_way is None
    assert measure(setup.trial(vector, 1.0), ["repetition"])["repetition"].wrong_way is None
    taken_out = replace(vector, method="ablation", edit="project_out", scope="all")
    assert measure(setup.trial(taken_out, 1.0), ["preference_margin"])["preference_margin"].wrong_way is None
    row = measure(setup.trial(vector, 1.0), ["preference_margin"])["preference_margin"].as_row()
    old = {name: value for name, value in row.items() if name != "wrong_way"}
    assert Measured.from_row(PreferenceMargin.columns["preference_margin"], old).wrong_way is None


# probe after removal


def test_what_is_taken_out_at_a_site_is_gone_along_its_direction_and_may_be_hidden_elsewhere(setup: Setup) -> None:
    vector = steerkit.fit(setup.model, setup.tokenizer, TRAIN, method="ablation", layers=[1], readout="response_mean")
    assert removes(vector)
    assert not removes(vector_for(setup.model, scope="all"))
    here, last = probe_after_removal(setup.trial(vector, 1.0), TRAIN)
    assert (str(here.site), str(last.site)) == ("resid_post.1", f"resid_post.{BLOCKS - 1}")
    assert here.direction is not None
    before, after = here.direction
    assert before.mean > 0.9
    assert after.mean == 0.5  # exactly: what rounding leaves is no coordinate
    assert last.direction is None
    assert here.probe[0].mean > 0.9
    # Half of it left: the direction still tells the sides apart.
    (half, _) = probe_after_removal(setup.trial(vector, 0.5), TRAIN)
    assert half.direction is not None
    assert half.direction[1].mean == before.mean


def test_probes_are_fitted_on_training_items_and_judged_on_others(setup: Setup) -> None:
    vector = steerkit.fit(setup.model, setup.tokenizer, TRAIN, method="ablation", layers=[1], readout="response_mean")
    trial = setup.trial(vector, 1.0)
    here, _ = probe_after_removal(trial, TRAIN)
    sides = []
    for data in (TRAIN, HELD_OUT):
        for side in data.sides:
            rendered = [setup.render(item) for item in side]
            sides.append(trial.record(rendered, ["resid_post.1"], readout="response_mean")["resid_post.1"])
    probe = linear_probe(sides[0], sides[1])
    assert here.probe[1].mean == auc(probe.scores(sides[2]), probe.scores(sides[3]))
    with pytest.raises(DataError, match="give a trial of one"):
        probe_after_removal(setup.baseline, TRAIN)


# intervals of fit and items together


def test_refit_intervals_are_their_definition(setup: Setup) -> None:
    vector = steerkit.fit(setup.model, setup.tokenizer, TRAIN, layers=[1], readout="response_mean")
    told: list[str] = []
    found = refit_interval(setup.trial(vector, 1.0), TRAIN, fits=4, resamples=5, seed=3, step=told.append)
    common: dict[str, Any] = {"batch_size": 16, "chat_template_kwargs": None}
    acts, subject, turns = read_again(setup.model, setup.tokenizer, TRAIN, vector, **common)
    rows = RearrangedRows(acts, subject, vector, turns)
    drawing, picking = torch.Generator().manual_seed(6), torch.Generator().manual_seed(7)
    before = PreferenceMargin().score(setup.baseline)["preference_margin"].double()
    means = []
    for _ in range(4):
        again = rows.fit(rows.resampled(drawing))
        change = PreferenceMargin().score(setup.trial(again, 1.0))["preference_margin"].double() - before
        drawn_items = torch.randint(len(change), (5, len(change)), generator=picking).tolist()
        means += [sum(float(change[place]) for place in picks) / len(picks) for picks in drawn_items]
    drawn = torch.tensor(means, dtype=torch.double)
    assert found.together.mean == pytest.approx(float(drawn.mean()), abs=1e-9)
    assert found.together.low == pytest.approx(float(drawn.quantile(0.025)), abs=1e-9)
    assert found.together.high == pytest.approx(float(drawn.quantile(0.975)), abs=1e-9)
    assert found.one_fit == measure(setup.trial(vector, 1.0), seed=3)["preference_margin"].change
    assert (found.fits, found.skipped) == (4, 0)
    assert told[1] == "fit 1 of 4"
    assert told[-1].startswith("fit 4 of 4, about ")
    assert set(found.as_json()) == {"column", "fits", "skipped", "one_fit", "fit_and_items"}


def test_few_noisy_training_items_make_the_interval_wider(setup: Setup) -> None:
    """Items that all move alike: the usual interval is as good as a point, and only the fit is in doubt."""

    class Alike(Scorer):
        name, title = "alike", "the first coordinate of the direction, for every item"
        columns: ClassVar[Any] = {"alike": Column("alike", "points")}

        def score(self, trial: Trial) -> dict[str, Tensor]:
            value = float(trial.vectors[0].params(Site(1))["direction"][0]) if trial.vectors else 0.0
            return {"alike": torch.full((8,), value)}

    vector = steerkit.fit(setup.model, setup.tokenizer, TRAIN, layers=[1], readout="response_mean")
    found = refit_interval(setup.trial(vector, 1.0), TRAIN, Alike(), fits=60, resamples=1)
    assert found.one_fit.low == found.one_fit.high
    acts, *_ = read_again(setup.model, setup.tokenizer, TRAIN, vector, batch_size=16, chat_template_kwargs=None)
    differences = (acts.positive[acts.sites[0]] - acts.negative[acts.sites[0]])[:, 0]
    error = float(differences.std(correction=0)) / math.sqrt(len(differences))
    assert found.together.high - found.together.low == pytest.approx(2 * 1.96 * error, rel=0.35)


def test_refit_intervals_say_what_they_cannot_do(setup: Setup) -> None:
    vector = steerkit.fit(setup.model, setup.tokenizer, TRAIN, layers=[1], readout="response_mean")
    with pytest.raises(DataError, match="got 0 vectors"):
        refit_interval(setup.baseline, TRAIN)
    with pytest.raises(DataError, match="at least 2 fits"):
        refit_interval(setup.trial(vector, 1.0), TRAIN, fits=1)
    with pytest.raises(DataError, match="the vector was fitted on data"):
        refit_interval(setup.trial(vector, 1.0), HELD_OUT)

    class Broken(Given):
        def score(self, trial: Trial) -> dict[str, Tensor]:
            is_own = not trial.vectors or trial.vectors[0] is vector
            return {"given": torch.tensor([1.0, 1.0] if is_own else [math.inf, math.inf])}

    with pytest.raises(NotScored, match="0 of 3 fits"):
        refit_interval(setup.trial(vector, 1.0), TRAIN, Broken(), fits=3)
