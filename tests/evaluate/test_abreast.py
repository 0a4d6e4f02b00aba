"""Trials abreast: the same figures and texts as one after the other, in fewer passes of no more rows than asked."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from steerkit.evaluate.abreast import ABREAST, companions
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.scorers.divergence import Divergence
from steerkit.evaluate.scorers.preference_margin import PreferenceMargin
from steerkit.evaluate.scorers.repetition import Repetition
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.trial import Trial
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.hold import Hold
from steerkit.vector.steering_vector import SteeringVector
from steerkit.vector.when import When
from tests.families import build
from tests.gated import gated_vector
from tests.modes import vector_for
from tests.tiny_tokenizers import byte_tokenizer

family = lru_cache(maxsize=None)(build)
DATA = ContrastSet.from_dataset(
    [
        {"prompt": "How is it?", "positive": "Fine, thank you.", "negative": "Bad, alas."},
        {"prompt": "And now?", "positive": "Well.", "negative": "Ill, as ever."},
        {"prompt": "Why is that so?", "positive": "Who knows?", "negative": "No idea."},
    ]
)


def setup_of(model: nn.Module, **options: Any) -> Setup:
    return Setup(model, byte_tokenizer(), DATA, neutral=DATA.positive, **{"max_new_tokens": 8, **options})


def asked(model: nn.Module, scope: str = "response") -> list[tuple[SteeringVector, float]]:
    """One vector at four strengths of both signs, and two with nothing learned at the same site."""
    vector = vector_for(model, scope=scope, site=Site(2))
    others = [random_like(vector, seed=seed) for seed in (1, 2)]
    return [(vector, 1.0), (vector, -0.5), (vector, 2.0), *((one, 1.0) for one in others), (vector, 0.25)]


def scores(trial: Trial) -> list[Tensor]:
    costs = Divergence().score(trial)
    return [PreferenceMargin().score(trial)["preference_margin"], *(one.values for one in costs.values())]


class Passes:
    """Counts a model's passes and their rows."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[int] = []
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: nn.Module, _args: Any, inputs: Any) -> None:
        self.rows.append(len(inputs["input_ids"]))

    def __enter__(self) -> list[int]:
        return self.rows

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@pytest.mark.parametrize(
    ("name", "scope"),
    [("llama", "response"), ("llama", "all"), ("gpt2", "all"), ("gemma3_text", "response"), ("qwen3_next", "response")],
)
def test_the_same_as_one_after_the_other(name: str, scope: str) -> None:
    model = family(name).eval()
    pairs = asked(model, scope)
    alone = [setup_of(model).trial(*pair) for pair in pairs]
    for mine, other in zip(setup_of(model).trials(pairs), alone, strict=True):
        for one, another in zip(scores(mine), scores(other), strict=True):
            torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-5)
        assert mine.texts == other.texts


def test_what_a_vector_says_of_itself_comes_first() -> None:
    model = family("llama").eval()
    vector = vector_for(model, scope="response", site=Site(2))
    own = replace(vector, norms={Site(2): 2.0}).at(scope="all", unit="norm", strength=0.5)
    pairs: list[Any] = [(own, None), (vector, 1.0), (replace(vector, norms={Site(2): 3.0}), -1.0)]
    alone = [setup_of(model).trial(*pair, scope="generated", unit="paper") for pair in pairs]
    for mine, other in zip(setup_of(model).trials(pairs, scope="generated", unit="paper"), alone, strict=True):
        for one, another in zip(scores(mine), scores(other), strict=True):
            torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-5)


def test_one_pass_for_several_trials() -> None:
    model = family("llama").eval()
    setup, pairs = setup_of(model), asked(model)
    setup.trial(*pairs[0]).log_probs([text for pair in setup.pairs for text in pair])  # what is found out once
    trials = setup.trials(pairs)
    with Passes(model) as rows:
        for trial in trials:
            PreferenceMargin().score(trial)
    texts = 2 * len(DATA)
    assert rows == [ABREAST * texts, 2 * texts]
    with Passes(model) as rows:
        for trial in trials:
            PreferenceMargin().score(trial)
    assert rows == [], "what is known is not asked again"


def test_texts_of_all_and_of_the_baseline_in_one_generation() -> None:
    model = family("llama").eval()
    setup, pairs = setup_of(model, max_new_tokens=3), asked(model)[:3]
    trials = setup.trials(pairs)
    with Passes(model) as rows:
        for trial in trials:
            Repetition().score(trial)
        assert setup.baseline.texts
    assert rows == [len(DATA), *[(len(pairs) + 1) * len(DATA)] * 3], "and the prompts are read once for all"


def test_no_more_rows_than_asked() -> None:
    model = family("llama").eval()
    setup = setup_of(model, batch_size=2, max_new_tokens=2)
    with Passes(model) as rows:
        for trial in setup.trials(asked(model)):
            scores(trial)
            assert trial.texts
    assert max(rows) == ABREAST * 2


def test_a_batch_that_does_not_fit_is_parted_between_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama").eval()
    pairs = asked(model)[:2]
    expected = [scores(setup_of(model).trial(*pair)) for pair in pairs]
    forward = model.forward

    def small(*args: Any, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("on purpose")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", small)
    setup = setup_of(model)
    setup.read._refused = True  # its passes have no batch to be parted
    with pytest.warns(UserWarning, match="do not fit into memory"):
        found = [scores(trial) for trial in setup.trials(pairs)]
    for mine, other in zip(found, expected, strict=True):
        for one, another in zip(mine, other, strict=True):
            torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-5)


def test_blocks_that_all_trials_leave_alone_run_once_for_a_text() -> None:
    model = family("llama").eval()
    pairs = asked(model)[:ABREAST]
    margins(setup_of(model).trials(pairs[:1]))  # what is found out once
    setup, together = setup_of(model), setup_of(model)
    first, *others = (flops(setup.trials([pair])) for pair in pairs)
    assert flops(together.trials(pairs)) == first + sum(others) < ABREAST * first


def margins(trials: list[Trial]) -> None:
    for trial in trials:
        PreferenceMargin().score(trial)


def flops(trials: list[Trial]) -> int:
    """Floating-point operations of scoring trials."""
    with FlopCounterMode(display=False) as counter:
        margins(trials)
    return int(counter.get_total_flops())


def test_who_runs_alone() -> None:
    model = family("llama").eval()
    setup = setup_of(model)
    vector = vector_for(model, scope="response", site=Site(2))
    elsewhere = vector_for(model, scope="response", site=Site(1))
    gated = gated_vector(model)
    by_row = replace(vector, strength=(1.0, 2.0))
    one, other, far, gate, two = setup.trials(
        [(vector, 1.0), (vector, 2.0), (elsewhere, 1.0), (gated, 1.0), ([vector, elsewhere], 1.0)]
    )
    (rows,) = setup.trials([(by_row, None)])
    ruled = vector.at(when=When.parse("it > 0").bound(lambda _: elsewhere))
    held = vector.at(hold=Hold.parse("it at 1 within 0 to 2").bound(lambda _: vector))
    read = setup.trials([(ruled, 1.0), (held, None), (vector, 1.0)])[:2]
    assert companions(one, same_sites=True) == [one, other]
    assert companions(one, same_sites=False) == [one, other, far]
    for single in (gate, two, rows, *read):
        assert companions(single, same_sites=False) == [single]
