"""Learned coefficients: what they make of the weights, their gradients, and what learning finds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import steerkit
from steerkit.errors import DataError, ModelError
from steerkit.evaluate.scorers.preference_margin import PreferenceMargin
from steerkit.methods._subject import Schedule
from steerkit.tuning import TaskVector, added, learn_coefficients
from steerkit.tuning.coefficients import Weighted
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer
from tests.tuning.pairs import IDS, finetuned, logits

DATA = steerkit.ContrastSet.from_answers(
    [(f"Is {n} good?", f"Yes, {n} is a joy.", f"No, {n} is a pain, and dull.") for n in range(4)]
)
MASK = torch.ones_like(IDS)


def test_with_1_everywhere_it_is_the_sum_and_with_0_the_base() -> None:
    base = build("llama").eval()
    vectors = [TaskVector.between(base, finetuned(base, seed=seed)) for seed in (1, 2)]
    weighted = Weighted(base, vectors)
    zeros = weighted.zeros()
    assert torch.equal(weighted.logits(zeros, IDS, MASK), logits(base))
    with added(base, vectors[0] + vectors[1]):
        wanted = logits(base)
    torch.testing.assert_close(weighted.logits(torch.ones_like(zeros), IDS, MASK), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gradient_is_the_product_of_slope_and_difference(family: str) -> None:
    base = build(family).eval()  # GPT-2 ties its head to the embeddings
    vector = TaskVector.between(base, finetuned(base))
    weighted = Weighted(base, [vector])
    values = weighted.zeros()
    sizes: Any = weighted.logits(values, IDS, MASK).logsumexp(-1).sum()
    sizes.backward()
    base(input_ids=IDS, attention_mask=MASK).logits.logsumexp(-1).sum().backward()
    slopes = {name: value.grad for name, value in base.named_parameters()}
    assert values.grad is not None
    for name, found in weighted.named(values.grad)[0].items():
        wanted = float((slopes[name].double() * vector.difference(name).double()).sum())
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])  # Llama's norms compute in float32 whatever it is in
def test_the_gradient_is_the_finite_difference(family: str) -> None:
    base = build(family).eval().double()
    weighted = Weighted(base, [TaskVector.between(base, finetuned(base))])
    values = torch.full_like(weighted.zeros(), 0.3, dtype=torch.float64).requires_grad_()

    def size(at: torch.Tensor) -> torch.Tensor:
        return weighted.logits(at, IDS, MASK).logsumexp(-1).sum()

    size(values).backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert float(values.grad.abs().max()) > 0.1
    with torch.no_grad():
        for place, found in enumerate(values.grad.tolist()):
            step = torch.zeros_like(values)
            step[place] = 1e-4
            slope = float(size(values + step) - size(values - step)) / 2e-4
            assert found == pytest.approx(slope, rel=1e-5, abs=1e-8), place


def test_mean_log_probs_are_those_of_rows_alone() -> None:
    base = build("llama").eval()
    weighted = Weighted(base, [TaskVector.between(base, finetuned(base))])
    setup = steerkit.Setup(base, byte_tokenizer(CHATML), DATA)
    texts = [text for pair in setup.pairs for text in pair]
    found = weighted.mean_log_probs(weighted.zeros().detach(), texts, 0)
    for row, text in enumerate(texts):
        logs = torch.log_softmax(logits(base, torch.tensor([text.ids]))[0], dim=-1)
        tokens = range(text.prompt_length, len(text.ids))
        wanted = sum(float(logs[place - 1, text.ids[place]]) for place in tokens) / len(tokens)
        assert float(found[row]) == pytest.approx(wanted, abs=1e-4)


def margin(model: Any) -> float:
    setup = steerkit.Setup(model, byte_tokenizer(CHATML), DATA)
    return float(PreferenceMargin().score(setup.baseline)["preference_margin"].mean())


def test_learning_finds_what_carries_the_behaviour_and_leaves_the_model_alone() -> None:
    base = build("llama").eval()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            value += (0.1 if "layers.1.mlp" in name else 1e-4) * torch.randn(
                value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32
            )
    vector = TaskVector.between(base, tuned)
    schedule = Schedule(epochs=15, batch_size=4, rate=0.2)
    learned = learn_coefficients(base, byte_tokenizer(CHATML), [vector], DATA, schedule=schedule, penalty=0.01)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(value.requires_grad for value in base.parameters())
    assert learned.history[-1] < learned.history[0]
    (found,) = learned.coefficients
    assert found.keys() == vector.shapes.keys()
    low = margin(base)
    with added(base, learned.vector):
        assert margin(base) > low + 0.1
    moved = {name: abs(value) * vector.norms()[name] for name, value in found.items()}
    assert "layers.1.mlp" in max(moved, key=lambda name: moved[name])


def test_what_cannot_be_learned_is_refused() -> None:
    base = build("llama").eval()
    tokenizer = byte_tokenizer(CHATML)
    with pytest.raises(DataError, match="no task vector"):
        learn_coefficients(base, tokenizer, [], DATA)
    other = build("gpt2")
    with pytest.raises(ModelError, match="LlamaForCausalLM has none"):
        learn_coefficients(base, tokenizer, [TaskVector.between(other, finetuned(other))], DATA)
