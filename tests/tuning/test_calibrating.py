"""The scale of a task vector by calibration: a planted effect, costs by hand, controls, and weights that stay."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steerkit
from steerkit.errors import DataError, ModelError, StrengthError
from steerkit.evaluate.intervals import interval
from steerkit.evaluate.kl_search import MAX_KL
from steerkit.prompts.neutral import neutral_texts
from steerkit.prompts.rendering import Rendered, render
from steerkit.tuning import CalibratedScale, TaskVector, added, calibrate_scale
from steerkit.tuning.changed_trial import changed
from steerkit.tuning.signs import random_signs
from tests import modes, quantised
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer
from tests.tuning.pairs import finetuned

TOKENIZER = byte_tokenizer(CHATML)
SEEN, HELD_OUT = (
    steerkit.ContrastSet.from_answers(
        [(f"Is {n} good?", f"Yes, {n} is a joy.", f"No, {n} is a pain.") for n in numbers]
    )
    for numbers in (range(4), range(4, 12))
)


def rendered(data: steerkit.ContrastSet) -> list[tuple[Rendered, Rendered]]:
    return [(render(TOKENIZER, a), render(TOKENIZER, b)) for a, b in zip(data.positive, data.negative, strict=True)]


def logs_by_hand(model: Any, text: Rendered) -> Tensor:
    """[t, v] what one text alone gets at the places that predict its answer's tokens, double."""
    logits = model(torch.tensor([text.ids])).logits[0, text.prompt_length - 1 : -1]
    return logits.double().log_softmax(-1)  # type: ignore[no-any-return]


def margin_by_hand(model: Any, pair: tuple[Rendered, Rendered]) -> Tensor:
    means = []
    for text in pair:
        logs, ids = logs_by_hand(model, text), text.ids[text.prompt_length :]
        means.append(sum(logs[place, token] for place, token in enumerate(ids)) / len(ids))
    return means[0] - means[1]


@torch.no_grad()
def kl_by_hand(model: Any, other: Any, texts: Any) -> float:
    total, tokens = 0.0, 0
    for text in texts:
        base, moved = (logs_by_hand(one, render(TOKENIZER, text)) for one in (model, other))
        for place in range(len(base)):
            total += sum((base[place].exp() * (base[place] - moved[place])).tolist())
            tokens += 1
    return total / tokens


def moved_by_hand(model: Any, vector: TaskVector, scale: float) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in other.named_parameters():
            value += scale * vector.difference(name)
    return other


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def base() -> Any:
    return build("llama").eval()


@pytest.fixture(scope="module")
def planted(base: Any) -> TaskVector:
    """One step along the gradient of the margins of other items."""
    tuned = copy.deepcopy(base)
    sum(margin_by_hand(tuned, pair) for pair in rendered(SEEN)).backward()
    with torch.no_grad():
        for value in tuned.parameters():
            value += 0.1 * value.grad
    tuned.zero_grad()
    return TaskVector.between(base, tuned)


@pytest.fixture(scope="module")
def found(base: Any, planted: TaskVector) -> CalibratedScale:
    return calibrate_scale(base, TOKENIZER, planted, HELD_OUT, texts=16, controls=3)


def test_a_planted_effect_is_found_inside_the_budget(base: Any, planted: TaskVector, found: CalibratedScale) -> None:
    assert found.works
    assert found.verdict.endswith("on 8 held-out items, clear of 3 controls and inside the budget")
    other = moved_by_hand(base, planted, found.scale)
    texts = neutral_texts()[:16]
    chose, confirmed = (kl_by_hand(base, other, texts[number::2]) for number in (0, 1))
    assert max(chose, confirmed) <= MAX_KL
    assert found.costs[found.scale].estimate.mean == pytest.approx(chose, rel=1e-3)
    assert found.confirmed.scores["kl"].estimate.mean == pytest.approx(confirmed, rel=1e-3)
    # As strong as the texts allow: the interval ends just inside the budget.
    assert 0.9 * MAX_KL <= found.costs[found.scale].estimate.high <= MAX_KL


@torch.no_grad()
def test_effects_are_those_of_weights_moved_by_hand(base: Any, planted: TaskVector, found: CalibratedScale) -> None:
    before = torch.stack([margin_by_hand(base, pair) for pair in rendered(HELD_OUT)])
    assert found.confirmed.scores["preference_margin"].change is not None
    assert (found.confirmed.scale, found.half.scale) == (found.scale, found.scale / 2)
    for one in (found.confirmed, found.half):
        other = moved_by_hand(base, planted, one.scale)
        after = torch.stack([margin_by_hand(other, pair) for pair in rendered(HELD_OUT)])
        wanted = interval(after, before=before, shares=False)
        assert one.scores["preference_margin"].change == pytest.approx(wanted, abs=1e-3)
        assert float((after - before).mean()) > 0.02


@torch.no_grad()
def test_controls_cost_the_same_and_are_moved_by_hand(base: Any, planted: TaskVector, found: CalibratedScale) -> None:
    assert len(found.controls) == 3
    texts = neutral_texts()[:16][1::2]
    for seed, one in enumerate(found.controls, start=1):
        other = moved_by_hand(base, random_signs(planted, seed=seed), one.scale)
        after = torch.stack([margin_by_hand(other, pair) for pair in rendered(HELD_OUT)])
        assert one.scores["preference_margin"].estimate.mean == pytest.approx(float(after.mean()), abs=1e-3)
        assert one.scores["kl"].estimate.mean == pytest.approx(kl_by_hand(base, other, texts), rel=1e-3)
        assert 0.5 * MAX_KL <= one.scores["kl"].estimate.mean <= 1.2 * MAX_KL


def test_the_answer_is_plain_data(found: CalibratedScale) -> None:
    plain = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert (plain["scale"], plain["verdict"], plain["works"]) == (found.scale, found.verdict, True)
    assert [one["scale"] for one in plain["costs"]] == sorted(found.costs)
    assert plain["confirmation"]["preference_margin"]["change"] > max(
        one["preference_margin"]["change"] for one in plain["controls"]
    )


def test_taken_away_it_does_the_opposite_and_noise_does_nothing(base: Any, planted: TaskVector) -> None:
    away = calibrate_scale(base, TOKENIZER, -planted, HELD_OUT, texts=8, controls=1)
    assert away.scale > 0
    assert away.confirmed.scores["preference_margin"].effect.high < 0
    assert not away.works
    noise = TaskVector.between(base, finetuned(base, seed=3))
    assert not calibrate_scale(base, TOKENIZER, noise, HELD_OUT, texts=8, controls=1).works


def test_a_longer_vector_has_a_smaller_scale(base: Any, planted: TaskVector) -> None:
    one, ten = (
        calibrate_scale(base, TOKENIZER, factor * planted, HELD_OUT, texts=8, controls=1) for factor in (1.0, 10.0)
    )
    assert ten.scale == pytest.approx(one.scale / 10, rel=0.1)


def test_the_unchanged_model_is_asked_unchanged_where_its_predictions_find_no_room(
    base: Any, planted: TaskVector, found: CalibratedScale, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerkit.evaluate.setup.KEPT_BYTES", 0)
    again = calibrate_scale(base, TOKENIZER, planted, HELD_OUT, texts=16, controls=1, batch_size=3)
    assert again.scale == found.scale
    assert again.confirmed.scores["kl"].estimate == pytest.approx(found.confirmed.scores["kl"].estimate, rel=1e-3)


def test_after_an_error_in_a_changed_pass_every_weight_is_what_it_was(base: Any, planted: TaskVector) -> None:
    before = weights(base)
    first = base.model.layers[0].mlp.up_proj.weight

    def fail(*_: Any) -> None:
        if not torch.equal(first, before["model.layers.0.mlp.up_proj.weight"]):
            raise KeyError("in the middle")

    handle = base.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyError, match="in the middle"):
        calibrate_scale(base, TOKENIZER, planted, HELD_OUT, texts=8)
    handle.remove()
    assert same(base, before)
    with added(base, planted):  # nothing of it is left on the model
        assert not same(base, before)
    assert same(base, before)


def test_a_changed_model_says_what_the_finetuned_one_says_whatever_ran_before(base: Any) -> None:
    tuned = finetuned(base)
    vector = TaskVector.between(base, tuned)
    setup = steerkit.Setup(base, TOKENIZER, HELD_OUT, max_new_tokens=6)
    wanted = steerkit.Setup(tuned, TOKENIZER, HELD_OUT, max_new_tokens=6).baseline
    for scope in ("all", "response"):  # steering that keeps blocks, and prompts
        steerkit.measure(setup.trial(modes.vector_for(base, scope=scope), 1.0), ["preference_margin", "divergence"])
    trial = changed(setup, vector, 1.0)
    one, other = (steerkit.measure(each, ["preference_margin"])["preference_margin"] for each in (trial, wanted))
    assert one.estimate == pytest.approx(other.estimate, abs=1e-4)
    assert trial.texts == wanted.texts
    assert trial.texts != setup.baseline.texts


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_random_signs_leave_sizes_and_take_the_direction(family: str) -> None:
    base = build(family)
    vector = 0.5 * TaskVector.between(base, finetuned(base))
    signed, other = (random_signs(vector, seed=seed) for seed in (1, 2))
    assert signed.shapes == vector.shapes
    assert signed.norms() == pytest.approx(vector.norms(), rel=1e-6)
    for name, shape in vector.shapes.items():
        mine, its = signed.difference(name), vector.difference(name)
        assert torch.equal(mine.abs(), its.abs())
        assert not torch.equal(mine, other.difference(name)), name
        pieces = [signed.rows(name, torch.zeros(1, *shape[1:]), row) for row in range(shape[0])]
        assert torch.equal(torch.cat(pieces), mine)
        if len(shape) == 2:
            turned = [row for row in range(shape[0]) if torch.equal(mine[row], -its[row])]
            kept = [row for row in range(shape[0]) if torch.equal(mine[row], its[row])]
            assert sorted(turned + kept) == list(range(shape[0]))
            assert 0.2 < len(kept) / shape[0] < 0.8
            singular = [torch.linalg.svdvals(one.double()) for one in (mine, its)]
            torch.testing.assert_close(singular[0], singular[1])
    single = TaskVector.between({"a": torch.zeros(())}, {"a": torch.ones(())})
    assert float(random_signs(single, seed=0).difference("a")) in (1.0, -1.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_kl": 0.0}, StrengthError, r"max_kl: got 0\.0; give a number of nats per token above 0"),
        ({"max_kl": float("nan")}, StrengthError, "max_kl: got nan"),
        ({"data": 3}, DataError, "3 items cannot tell an effect; give at least 4"),
        ({"texts": 6}, DataError, "6 neutral texts and 5 controls; give at least 8 texts"),
        ({"controls": 0}, DataError, "0 controls; give .* 1 control"),
        ({"vector": 0.0}, StrengthError, "changes nothing, for every factor is 0"),
        ({"vector": 1e-12}, StrengthError, "no strength with a KL divergence near 0.15 was found: 64 gives .*; give a"),
        ({"data": "prompts"}, DataError, "item 0 has no two answers to one prompt"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_a_line(
    base: Any, planted: TaskVector, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {"texts": 8, **change}
    vector, wish = planted * given.pop("vector", 1.0), given.pop("data", 8)
    prompts = steerkit.ContrastSet.from_prompts(list("abcd"), list("efgh"))
    data = (
        prompts
        if wish == "prompts"
        else replace(HELD_OUT, positive=HELD_OUT.positive[:wish], negative=HELD_OUT.negative[:wish])
    )
    before = weights(base)
    with pytest.raises(error, match=message) as caught:
        calibrate_scale(base, TOKENIZER, vector, data, **given)
    assert "\n" not in str(caught.value)
    assert same(base, before)


def test_models_that_it_cannot_be_added_to_are_refused_in_a_line(base: Any, tmp_path: Path) -> None:
    other = build("gpt2")
    with pytest.raises(ModelError, match="LlamaForCausalLM has not"):
        calibrate_scale(base, TOKENIZER, TaskVector.between(other, finetuned(other)), HELD_OUT, texts=8)
    plain = quantised.llama()
    vector = TaskVector.between(plain, finetuned(plain))
    with pytest.raises(ModelError, match="is quantised") as caught:
        calibrate_scale(quantised.quantised("bnb8", tmp_path), TOKENIZER, vector, HELD_OUT, texts=8)
    assert "\n" not in str(caught.value)
