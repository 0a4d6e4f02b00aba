"""A first strength from its cost: what the budget says, what the file says of it, and when nothing is suggested."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import steerkit
from steerkit.errors import StrengthError
from steerkit.evaluate.suggesting import LIMIT_KL, MAX_KL, can_be_suggested, suggest_strength, with_suggestion
from steerkit.network.sites import Site
from steerkit.prompts.neutral import neutral_texts
from steerkit.prompts.rendering import render
from steerkit.vector.description import strength_source
from steerkit.vector.steering_vector import SteeringVector
from tests import modes
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(CHATML)


def unknown(model: Any, **changes: Any) -> SteeringVector:
    return replace(modes.vector_for(model, scope="response"), suggested_strength=None, **changes)


def kl_by_hand(model: Any, tokenizer: Any, vector: SteeringVector, strength: float, texts: Any) -> float:
    """Token by token, one text at a time, with a hook of its own."""
    direction = vector.params(vector.sites[0])["direction"]
    total, tokens = 0.0, 0
    for text in texts:
        rendered = render(tokenizer, text)
        ids = torch.tensor([rendered.ids])
        start = rendered.prompt_length - 1

        def add(_module: Any, _args: Any, output: Any, start: int = start) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            h = h.clone()
            h[:, start:] += strength * direction
            return (h, *output[1:]) if isinstance(output, tuple) else h

        with torch.no_grad():
            base = model(ids).logits[0, start:-1].double().log_softmax(-1)
            handle = model.model.layers[vector.sites[0].layer].register_forward_hook(add)
            moved = model(ids).logits[0, start:-1].double().log_softmax(-1)
            handle.remove()
        for position in range(len(base)):
            total += sum((base[position].exp() * (base[position] - moved[position])).tolist())
            tokens += 1
    return total / tokens


def test_it_is_the_strength_at_which_the_budget_is_spent(model: Any, tokenizer: Any) -> None:
    found = suggest_strength(model, tokenizer, unknown(model), texts=2)
    assert found.suggested_strength is not None
    spent = kl_by_hand(model, tokenizer, found, found.suggested_strength, neutral_texts()[0::2][:2])
    assert 0.85 * MAX_KL <= spent <= 1.001 * MAX_KL
    assert found.calibration["kl"] == pytest.approx(spent, rel=1e-3)
    limit = kl_by_hand(model, tokenizer, found, found.calibration["limit"], neutral_texts()[0::2][:2])
    assert 0.85 * LIMIT_KL <= limit <= 1.001 * LIMIT_KL
    assert found.calibration["confirmed"] is False


def test_another_budget_and_another_length_of_the_direction(model: Any, tokenizer: Any) -> None:
    vector = unknown(model)
    low, high = (suggest_strength(model, tokenizer, vector, max_kl=kl, texts=2) for kl in (0.02, 0.2))
    assert low.suggested_strength is not None
    assert high.suggested_strength is not None
    assert low.suggested_strength < high.suggested_strength
    longer = unknown(model, tensors={name: 1000 * one for name, one in vector.tensors.items()})
    again = suggest_strength(model, tokenizer, longer, max_kl=0.2, texts=2)
    assert again.suggested_strength == pytest.approx(high.suggested_strength / 1000, rel=0.1)


def test_the_file_keeps_it_and_says_where_it_comes_from(model: Any, tokenizer: Any) -> None:
    found = suggest_strength(model, tokenizer, unknown(model), texts=2)
    back = SteeringVector.from_bytes(found.to_bytes())
    assert back == found
    assert "not confirmed" in strength_source(back)
    assert "not confirmed" not in strength_source(replace(back, calibration={"by": "calibrate", "confirmed": True}))
    with steerkit.steer(model, back) as steering:
        assert steering.sites == back.sites


def test_nothing_is_used_at_1_unasked(model: Any, tokenizer: Any) -> None:
    with pytest.raises(StrengthError, match=r"caa: the file suggests no strength .* give a strength, such as"):
        steerkit.steer(model, unknown(model))
    with pytest.raises(StrengthError, match="suggests no strength"):
        steerkit.generate(model, tokenizer, ["Hello"], vector=unknown(model), max_new_tokens=1)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_that_is_none(model: Any, tokenizer: Any, budget: float) -> None:
    with pytest.raises(StrengthError, match=r"max_kl: got .* above 0"):
        suggest_strength(model, tokenizer, unknown(model), max_kl=budget)


def test_what_neutral_texts_cannot_tell(model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    # Removal has a natural strength of its own; nothing is measured for it.
    data = steerkit.ContrastSet.from_prompts(["one", "two"], ["three", "four"])
    removal = steerkit.fit(model, tokenizer, data, method="ablation")
    assert not can_be_suggested(removal)
    with pytest.raises(StrengthError, match="ablation: neutral texts tell no strength"):
        suggest_strength(model, tokenizer, removal)
    assert with_suggestion(model, tokenizer, removal) == removal
    # A direction that changes no prediction, whatever its strength: far below the resolution of the stream.
    nothing = unknown(model, tensors={"resid_post.1/direction": torch.full((32,), 1e-30)})
    assert with_suggestion(model, tokenizer, nothing).suggested_strength is None
    assert "no strength is suggested" in caplog.text


def test_a_strength_beyond_the_budget_is_warned_of_once(model: Any) -> None:
    vector = unknown(model, calibration={"by": "suggest_strength", "limit": 2.125, "max_kl": 0.15})
    vector = replace(vector, suggested_strength=1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steerkit.steer(model, vector, 2.0)
        steerkit.steer(model, replace(vector, norms={Site(1): 5.0}), 50.0, unit="norm")  # counts in another unit
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # Python's own
        for _ in range(3):
            steerkit.steer(model, vector, -3.0)
    (shown,) = caught
    assert "strength 3 is beyond 2.125" in str(shown.message)


def test_one_norm_is_the_spread_where_a_file_has_one_and_the_norm_in_older_files(model: Any) -> None:
    site = Site(1)
    old = unknown(model, norms={site: 50.0})
    new = replace(old, spreads={site: 20.0})
    length = float(old.params(site)["direction"].norm())
    ids = torch.tensor([[5, 17, 44]])
    for vector, one in ((old, 50.0), (new, 20.0)):
        with torch.no_grad(), steerkit.steer(model, vector, 0.5, unit="norm", scope="all"):
            by_norm = model(ids).logits
        with torch.no_grad(), steerkit.steer(model, vector, 0.5 * one / length, scope="all"):
            assert torch.equal(by_norm, model(ids).logits)


def test_the_embedded_model_costs_the_same_on_texts_it_was_not_measured_on(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    vector = replace(SteeringVector.load("optimism-caa"), suggested_strength=None, calibration={})
    found = suggest_strength(model, tokenizer, vector, texts=2)
    others = steerkit.Setup(model, tokenizer, neutral=neutral_texts()[1::2][:4])
    scored = steerkit.measure(others.trial(replace(found, calibration={}), found.suggested_strength), ["divergence"])
    assert MAX_KL / 2 <= scored["kl"].estimate.mean <= 2 * MAX_KL
