"""Emulated finetuning: against the formula without caches, in beams and padded rows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steerkit.errors import ModelError, StrengthError
from steerkit.tuning import EmulatedFinetuning
from tests.families import build
from tests.tuning.pairs import IDS, finetuned, greedy, logits


class ByHand:
    """The formula, every model run on the whole text anew."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        moved = scores.clone()
        for tuned, base, factor in self.pairs:
            first, second = (torch.log_softmax(logits(one, input_ids)[:, -1], dim=-1) for one in (tuned, base))
            moved += factor * (first - second)
        return torch.log_softmax(moved, dim=-1)


@pytest.fixture(scope="module")
def models() -> tuple[Any, list[tuple[Any, Any, float]]]:
    large, small = build("qwen3").eval(), build("llama").eval()
    pairs = [(finetuned(small, seed=seed, size=0.2).eval(), small, factor) for seed, factor in ((1, 0.7), (2, 0.3))]
    return large, pairs


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}])
def test_it_is_the_formula(models: Any, options: dict[str, Any]) -> None:
    large, pairs = models
    found = greedy(large, logits_processor=[EmulatedFinetuning(pairs)], **options)
    assert torch.equal(found, greedy(large, logits_processor=[ByHand(pairs)], **options))
    assert not torch.equal(found, greedy(large, **options))


def test_a_model_beside_itself_moves_nothing_and_one_processor_serves_many_calls(models: Any) -> None:
    large, pairs = models
    small = pairs[0][1]
    processor = EmulatedFinetuning([(small, small, 1.0)])
    for ids in (IDS, IDS[:, :4], IDS[:1]):
        assert torch.equal(greedy(large, ids, logits_processor=[processor]), greedy(large, ids))


def test_the_base_is_scaled_up_to_its_finetuned_model(models: Any) -> None:
    _, pairs = models
    tuned, base, _ = pairs[0]
    assert torch.equal(greedy(base, logits_processor=[EmulatedFinetuning([(tuned, base, 1.0)])]), greedy(tuned))


def test_rows_padded_at_the_left_are_what_they_are_alone(models: Any) -> None:
    large, pairs = models
    processor = EmulatedFinetuning(pairs, pad_id=0)
    ids, mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1), torch.ones(2, 9, dtype=torch.long)
    mask[:, :3] = 0
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "logits_processor": [processor]}
    padded = large.generate(ids, attention_mask=mask, **how)
    assert torch.equal(padded[:, 9:], greedy(large, max_new_tokens=8, logits_processor=[processor])[:, 6:])


def test_what_does_not_go_together_is_refused(models: Any) -> None:
    import transformers

    large, pairs = models
    tuned, base, _ = pairs[0]
    config = transformers.LlamaConfig(**{**base.config.to_dict(), "vocab_size": 321})
    other = transformers.LlamaForCausalLM(config)
    with pytest.raises(ModelError, match="no pair"):
        EmulatedFinetuning([])
    with pytest.raises(StrengthError, match="finite"):
        EmulatedFinetuning([(tuned, base, float("nan"))])
    with pytest.raises(ModelError, match=r"\[320, 321\]"):
        EmulatedFinetuning([(tuned, other, 1.0)])
    with pytest.raises(ModelError, match="320 tokens and the small ones 321"):
        greedy(large, logits_processor=[EmulatedFinetuning([(other, other, 1.0)])])
