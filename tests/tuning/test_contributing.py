"""`contribution`: against sums taken block by block, with and without a second model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from steerkit.errors import DataError, ModelError
from steerkit.tuning import contribution
from tests.families import HIDDEN, build
from tests.tiny_tokenizers import CHATML, byte_tokenizer
from tests.tuning.pairs import pair

PROMPTS = ["How are you?", "Hi", "Tell me of the sea, and of ships."]


@torch.no_grad()
def parts(tuned: Any, base: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, what base blocks and finetuning add to the last token [blocks, d] each, and the last output."""
    body = tuned.model
    h = start = body.embed_tokens(ids)
    places = torch.arange(ids.shape[1])[None]
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    how = {"attention_mask": mask, "position_embeddings": body.rotary_emb(h, places), "position_ids": places}
    plain, added = [], []
    for first, second in zip(base.model.layers, tuned.model.layers, strict=True):
        one, two = first(h, **how), second(h, **how)
        plain.append((one - h)[0, -1])
        added.append((two - one)[0, -1])
        h = two
    return start[0, -1], torch.stack(plain), torch.stack(added), h[0, -1]


def share(part: Tensor, rest: Tensor, order: int) -> float:
    sizes = [float(one.norm(p=order)) for one in (part, rest)]
    return sizes[0] / sum(sizes)


def test_it_is_the_share_of_the_sums_and_the_parts_make_up_the_stream() -> None:
    tuned, base = pair()
    tokenizer = byte_tokenizer(CHATML)
    found = contribution(tuned, base, tokenizer, PROMPTS, batch_size=2)
    for row, prompt in enumerate(PROMPTS):
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        start, plain, added, end = parts(tuned, base, ids)
        torch.testing.assert_close(start + plain.sum(0) + added.sum(0), end, rtol=0, atol=2e-5)
        assert float(found.values[row]) == pytest.approx(share(added.sum(0), plain.sum(0), 1), abs=1e-5)
        assert float(found.l2[row]) == pytest.approx(share(added.sum(0), plain.sum(0), 2), abs=1e-5)
        torch.testing.assert_close(found.tuned[row], added.abs().sum(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.plain[row], plain.abs().sum(1), rtol=1e-4, atol=1e-4)
    assert bool(((found.values > 0) & (found.values < 1)).all())
    assert found.profile.shape == (4,)
    assert found.massive == {}
    assert torch.equal(found.without_massive, found.values)
    assert found.estimate.low <= float(found.values.mean()) <= found.estimate.high


def test_models_that_are_the_same_contribute_exactly_nothing() -> None:
    tuned, _ = pair()
    found = contribution(tuned, copy.deepcopy(tuned), byte_tokenizer(CHATML), PROMPTS)
    assert not found.values.any()
    assert not found.tuned.any()
    assert not found.profile.any()


def test_only_the_block_that_was_changed_stands_out() -> None:
    base = build("llama")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[2].mlp.down_proj.weight += 0.1
    found = contribution(tuned, base, byte_tokenizer(CHATML), PROMPTS)
    assert (found.profile > 0).tolist() == [False, False, True, False]


def test_an_adapter_is_its_own_pair() -> None:
    model = build("llama_peft").eval()
    merged, base = copy.deepcopy(model).merge_and_unload(), copy.deepcopy(model).unload()
    tokenizer = byte_tokenizer(CHATML)
    found, wanted = contribution(model, None, tokenizer, PROMPTS), contribution(merged, base, tokenizer, PROMPTS)
    torch.testing.assert_close(found.values, wanted.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.profile, wanted.profile, rtol=0, atol=1e-5)


def test_massive_dimensions_are_left_out_beside() -> None:
    tuned, base = pair()
    for model in (tuned, base):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[5] *= 400
    found = contribution(tuned, base, byte_tokenizer(CHATML), PROMPTS)
    assert list(found.massive) == [5]
    assert not torch.equal(found.without_massive, found.values)
    assert found.values.shape == (3,) and HIDDEN > 5


def test_what_cannot_be_read_is_refused() -> None:
    tuned, base = pair()
    nothing: list[str] = []
    for given in ("one string", nothing):
        with pytest.raises(DataError, match="list of prompts"):
            contribution(tuned, base, byte_tokenizer(CHATML), given)
    with pytest.raises(ModelError, match="no adapter"):
        contribution(tuned, None, byte_tokenizer(CHATML), PROMPTS)
