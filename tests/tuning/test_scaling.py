"""`scaled`: against base blocks in finetuned surroundings, with caches, beams and adapters; what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from steerkit.errors import ModelError, StrengthError
from steerkit.tuning import scaled
from tests.families import build
from tests.tuning.pairs import IDS, finetuned, greedy, logits, pair, with_base_blocks


def by_hand(tuned: Any, base: Any, alpha: float, ids: Tensor) -> Any:
    """Logits of a llama whose blocks are put together one by one, without a cache."""
    body = tuned.model
    h = body.embed_tokens(ids)
    places = torch.arange(ids.shape[1])[None]
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None].to(h.dtype)
    how = {"attention_mask": mask, "position_embeddings": body.rotary_emb(h, places), "position_ids": places}
    for first, second in zip(base.model.layers, tuned.model.layers, strict=True):
        plain = first(h, **how)
        h = plain + alpha * (second(h, **how) - plain)
    return tuned.lm_head(body.norm(h))


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.75, 1.25])
def test_it_is_the_sum_block_by_block(alpha: float) -> None:
    tuned, base = pair()
    with torch.no_grad():
        wanted = by_hand(tuned, base, alpha, IDS)
    with scaled(tuned, base, alpha):
        found = logits(tuned)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def test_at_0_base_blocks_run_between_the_finetuned_ends_and_at_1_the_model_is_itself() -> None:
    tuned, base = pair()
    before = logits(tuned)
    with scaled(tuned, base, 0.0):
        assert torch.equal(logits(tuned), logits(with_base_blocks(tuned, base)))
    with scaled(tuned, base, 1.0):
        assert torch.equal(logits(tuned), before)
        assert not tuned.model.layers[0]._forward_hooks
    assert torch.equal(logits(tuned), before)


def test_it_is_no_interpolation_of_weights() -> None:
    tuned, base = pair()
    half = copy.deepcopy(base)
    with torch.no_grad():
        for one, two in zip(half.parameters(), tuned.parameters(), strict=True):
            one += 0.5 * (two - one)
    with scaled(tuned, base, 0.5):
        assert float((logits(tuned) - logits(half)).abs().max()) > 0.1


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_next", "mamba", "gemma4_kv_shared"])
def test_with_a_cache_the_texts_are_those_without_one(family: str) -> None:
    tuned, base = pair(family)
    for alpha in (0.0, 1.25):
        with scaled(tuned, base, alpha):
            whole = greedy(tuned, use_cache=False)
            assert torch.equal(greedy(tuned), whole), alpha
        assert not torch.equal(greedy(tuned), whole), "the test says nothing where scaling changes no token"


def test_beams_follow_with_both_caches() -> None:
    tuned, base = pair()
    with scaled(tuned, base, 0.0):
        beams = greedy(tuned, num_beams=3, num_return_sequences=3)
        assert torch.equal(beams, greedy(tuned, num_beams=3, num_return_sequences=3, use_cache=False))
    assert torch.equal(beams, greedy(with_base_blocks(tuned, base), num_beams=3, num_return_sequences=3))


def test_a_cache_is_cropped_and_copied_with_its_second_one() -> None:
    from transformers import DynamicCache

    tuned, base = pair()
    with scaled(tuned, base, 0.5):
        wanted = logits(tuned)
        cache = DynamicCache(config=tuned.config)
        logits(tuned, IDS[:, :5], past_key_values=cache)
        kept = copy.deepcopy(cache)
        cache.crop(-2)
        found = logits(tuned, IDS[:, 3:], past_key_values=cache)
        torch.testing.assert_close(found, wanted[:, 3:], rtol=0, atol=2e-5)
        found = logits(tuned, IDS[:, 5:], past_key_values=kept)
        torch.testing.assert_close(found, wanted[:, 5:], rtol=0, atol=2e-5)


def test_rows_padded_at_the_left_are_what_they_are_alone() -> None:
    tuned, base = pair()
    ids, mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1), torch.ones(2, 9, dtype=torch.long)
    mask[:, :3] = 0
    with scaled(tuned, base, 0.5):
        padded = tuned.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(padded[:, 9:], greedy(tuned, max_new_tokens=8)[:, 6:])


def test_an_adapter_needs_no_second_model_and_keeps_its_gradients() -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = build("llama_peft").eval()
    with torch.no_grad(), model.disable_adapter():
        plain = logits(model)
    taking = {name for name, one in model.named_parameters() if one.requires_grad}
    merged = copy.deepcopy(model).merge_and_unload()
    base = copy.deepcopy(model).unload()
    with scaled(model, None, 0.0):
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-6)
    with scaled(model, None, 0.5):
        found, texts = logits(model), greedy(model)
        assert torch.equal(texts, greedy(model, use_cache=False))
    with scaled(merged, base, 0.5):
        torch.testing.assert_close(found, logits(merged), rtol=0, atol=2e-5)
    assert {name for name, one in model.named_parameters() if one.requires_grad} == taking
    assert not any(one.disable_adapters for one in model.modules() if isinstance(one, BaseTunerLayer))


def test_what_does_not_go_together_is_refused() -> None:
    tuned, base = pair()
    with pytest.raises(StrengthError, match="alpha is nan"), scaled(tuned, base, float("nan")):
        pass
    with pytest.raises(ModelError, match="one object"), scaled(tuned, tuned, 0.5):
        pass
    with pytest.raises(ModelError, match="no adapter to be switched off"), scaled(tuned, None, 0.5):
        pass
    with pytest.raises(ModelError, match="differ in family"), scaled(tuned, build("qwen2"), 0.5):
        pass
    with scaled(tuned, base, 0.5), pytest.raises(ModelError, match="already"), scaled(tuned, base, 0.5):
        pass
    assert not tuned.model.layers[0]._forward_hooks
    merged = build("llama_peft")
    merged.merge_adapter()
    with pytest.raises(ModelError, match="merged into"), scaled(merged, None, 0.5):
        pass


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 3}, "depth: 4 and 3"),
        ({"hidden_size": 64}, "width: 32 and 64"),
        ({"vocab_size": 321}, "vocab_size: 320 and 321"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, "rope_parameters"),
        ({"intermediate_size": 40}, "mlp.down_proj.weight"),
    ],
)
def test_pairs_of_another_form_are_refused(change: dict[str, Any], said: str) -> None:
    import transformers

    tuned, _ = pair()
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**tuned.config.to_dict(), **change}))
    with pytest.raises(ModelError, match=said), scaled(tuned, other, 0.5):
        pass


def test_a_cache_from_outside_is_refused() -> None:
    from transformers import DynamicCache

    tuned, base = pair()
    cache = DynamicCache(config=tuned.config)
    logits(tuned, IDS[:, :3], past_key_values=cache)
    with scaled(tuned, base, 0.5), pytest.raises(ModelError, match="begun outside"):
        logits(tuned, IDS[:, 3:], past_key_values=cache)
    cache = DynamicCache(config=tuned.config)
    with scaled(tuned, base, 0.5):
        logits(tuned, IDS[:, :3], past_key_values=cache)
    logits(tuned, IDS[:, 3:5], past_key_values=cache)
    with scaled(tuned, base, 0.5), pytest.raises(ModelError, match="base blocks have read 3"):
        logits(tuned, IDS[:, 5:], past_key_values=cache)


def test_half_precision_is_rounded_once() -> None:
    base = build("llama").to(torch.bfloat16)
    tuned = finetuned(base)
    with scaled(tuned, base, 0.0):
        assert torch.equal(logits(tuned), logits(with_base_blocks(tuned, base)))
