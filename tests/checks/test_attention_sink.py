"""The attention sink: its definition head by head, and whether a vector breaks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steerkit.checks.doctor.attention_sink import SINK, _ids, first_token_weights, sink_weights
from steerkit.checks.doctor.case import Case
from steerkit.checks.doctor.checks import CHECKS, checks_of, doctor
from steerkit.checks.doctor.given_checks import pairs, sink
from steerkit.checks.doctor.judging import Broken
from steerkit.errors import VectorMismatchError
from steerkit.network.decoder import find_decoder
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.steering.steering import steer
from tests.families import build
from tests.modes import vector_for
from tests.tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()


def slow_alpha(attention: Tensor, k: int) -> float:
    """1 / (T - k + 1) times the sum over i from k to T of A[i, k]; positions from 1."""
    length = len(attention)
    return sum(float(attention[i - 1, k - 1]) for i in range(k, length + 1)) / (length - k + 1)


def test_alpha_of_uniform_attention_and_of_a_full_sink() -> None:
    uniform = torch.tril(torch.ones(8, 8)) / torch.arange(1.0, 9.0)[:, None]
    assert float(first_token_weights(uniform)) == pytest.approx(0.3397, abs=5e-5)
    full = torch.zeros(8, 8)
    full[:, 0] = 1.0
    assert float(first_token_weights(full)) == 1.0
    drawn = torch.softmax(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    for row in range(2):
        for head in range(3):
            assert float(first_token_weights(drawn)[row, head]) == pytest.approx(slow_alpha(drawn[row, head], 1))


def case_of(family: str, **given: Any) -> Case:
    model = build(family)
    return Case(model, TOKENIZER, False, find_decoder(model), **given)


def implementations(model: Any) -> list[str | None]:
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return [getattr(config, "_attn_implementation", None) for config in configs]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_vlm"])
def test_heads_are_those_of_the_eager_maps_and_the_model_stays_as_it_was(family: str) -> None:
    case = case_of(family)
    before = implementations(case.model)
    found = sink_weights(case, steered=False)
    assert implementations(case.model) == before
    assert "eager" not in before
    assert found.shape == (4 * case.decoder.num_layers,)
    assert bool(((found > 0) & (found <= 1)).all())


def test_steered_maps_are_those_of_the_steered_model() -> None:
    vector = vector_for(build("llama"), scope="response", size=3.0)
    case = case_of("llama", given=vector, strength=2.0)
    found = sink_weights(case, steered=True)
    plain = sink_weights(case, steered=False)
    assert torch.equal(found[:8], plain[:8])  # the vector acts behind block 1
    assert not torch.allclose(found[8:], plain[8:], atol=1e-3)
    eager = build("llama")
    eager.set_attn_implementation("eager")
    ids = _ids(case)
    with torch.no_grad(), steer(eager, vector, 2.0, prompt_lengths=[2] * len(ids)):
        maps = eager(input_ids=ids, output_attentions=True, use_cache=False).attentions
    assert ids.shape == (4, 64)
    for block, own in enumerate(maps):
        for head in range(4):
            by_hand = sum(slow_alpha(own[row, head], 1) for row in range(4)) / 4
            assert float(found[4 * block + head]) == pytest.approx(by_hand, abs=1e-6)


def test_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {False: torch.tensor([0.9, 0.8, 0.7, 0.1]), True: torch.tensor([0.9, 0.2, 0.1, 0.9])}
    monkeypatch.setattr("steerkit.checks.doctor.given_checks.sink_weights", lambda case, *, steered: weights[steered])
    case = case_of("llama")
    with pytest.raises(Broken, match="breaks the attention sink: 3 of 4 heads have a sink, steered 2; 2 lose it"):
        sink(case)
    weights[True] = torch.tensor([0.9, 0.31, 0.1, 0.1])
    assert sink(case) == "3 of 4 heads have a sink, steered 2; 1 lose it"
    weights[False] = torch.tensor([SINK, 0.1])
    weights[True] = torch.tensor([0.1, 0.1])
    assert sink(case) == "0 of 2 heads have a sink, steered 0; 0 lose it"


def test_a_model_without_attention_maps_says_so() -> None:
    assert sink(case_of("mamba")) == (
        "not looked at: MambaForCausalLM gives no attention maps: it has no eager attention"
    )


def test_the_doctor_looks_at_what_it_is_given() -> None:
    model = build("llama")
    vector = vector_for(model, scope="response", size=0.1)
    data = ContrastSet.from_answers([("Well?", "No way.", "Yes!"), ("Well?", "Yes.", "Yes."), ("And?", "One", "Two")])
    assert checks_of(None, None) == CHECKS
    assert [check.__name__ for check in checks_of(data, vector)[-2:]] == ["sink", "pairs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steerkit.checks.doctor.checks.CHECKS", ())
        found = {one.check: one for one in doctor(model, TOKENIZER, data=data, vector=vector, strength=1.0)}
        with pytest.raises(VectorMismatchError):
            doctor(model, TOKENIZER, vector=replace(vector, num_layers=7))
        (again,) = doctor(model, TOKENIZER, vector=[vector.at(1.0), vector.at(-1.0)])
    assert found["sink"].passed
    assert again.passed
    assert found["pairs"] == ("pairs", True, "pairs 2 of 3 looked at: both answers are nearly one thing to the model")
    unpaired = ContrastSet.from_prompts(["a", "b"], ["c", "d"])
    assert pairs(Case(model, TOKENIZER, False, find_decoder(model), unpaired)).startswith("not looked at: item 0")
