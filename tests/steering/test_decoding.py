"""A decoding loop of one's own, which tells of its rows: every scope means what it means in `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.errors import ModelError, ScopeError, StrengthError
from steerkit.steering.row_plans import RowPlans
from steerkit.tokens import Decoding
from tests import modes
from tests.families import build
from tests.modes import LONG, SHORT, vector_for
from tests.tiny_tokenizers import byte_tokenizer

SCOPES = (
    *("all", "prompt", "response", "generated", "first(2)"),
    *("response(1:3)", "generated(:2)", "assistant", "after(0)"),
)
TOKENIZER = byte_tokenizer()
START = TOKENIZER("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]


def joined(first: Any, second: Any) -> Any:
    """Two caches one below the other, the narrower one padded at the left."""
    width = max(first.get_seq_length(), second.get_seq_length())
    for one, other in zip(first.layers, second.layers, strict=True):
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in (one, other)]
            padded = [torch.nn.functional.pad(part, (0, 0, width - part.shape[-2], 0)) for part in parts]
            setattr(one, name, torch.cat(padded))
    return first


def loop(model: Any, rows: list[Any], prompts: list[list[int]], *, late: int, steps: int) -> list[Tensor]:
    """Greedy tokens of two rows, the second of which comes after the first has chosen some."""
    texts, cache, ends = [list(prompts[0])], None, [len(prompts[0])]

    def run(own: list[Any], told: Decoding, **inputs: Any) -> Any:
        steering = steerkit.steer(model, own, tokenizer=TOKENIZER)
        with torch.no_grad(), steering, steering.decoding(told):
            return model(use_cache=True, **inputs)

    for step in range(steps):
        if step == late:
            new = run(rows[1:], Decoding([len(prompts[1])]), input_ids=torch.tensor([prompts[1]]))
            cache = joined(cache, new.past_key_values)
            texts.append([*prompts[1], int(new.logits[0, -1].argmax())])
            ends.append(len(prompts[1]))
        held = [text[:-1] if cache is not None else [] for text in texts]
        fed = [text[len(one) :] for text, one in zip(texts, held, strict=True)]
        width = max(map(len, texts))
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -len(fed[0]) :]
        told = Decoding(ends, held)
        inputs = {"input_ids": torch.tensor(fed), "attention_mask": mask, "position_ids": positions}
        out = run(rows[: len(texts)], told, past_key_values=cache, **inputs)
        cache = out.past_key_values
        for text, logits in zip(texts, out.logits, strict=True):
            text.append(int(logits[-1].argmax()))
    return [torch.tensor(text[end:]) for text, end in zip(texts, ends, strict=True)]


@pytest.mark.parametrize("scope", SCOPES)
def test_rows_that_came_at_different_times_are_what_they_are_alone(scope: str) -> None:
    model = build("llama").eval()
    model.generation_config.eos_token_id = None
    vectors = [vector_for(model, scope=scope, seed=seed).at(2.0 - seed) for seed in range(2)]
    faded = vectors[1] if scope in ("assistant", "after(0)") else vectors[1].at(fade="linear over 4")
    rows = [[vectors[0]], [faded]]
    prompts = [list(START), [*START, *SHORT]]
    found = loop(model, rows, prompts, late=3, steps=6)
    for own, prompt, tokens in zip(rows, prompts, found, strict=True):
        with torch.no_grad(), steerkit.steer(model, own, tokenizer=TOKENIZER):
            ids = torch.tensor([prompt])
            out = model.generate(ids, max_new_tokens=len(tokens), do_sample=False, pad_token_id=0)
        assert torch.equal(out[0, len(prompt) :], tokens), scope


def test_a_recurrent_cache_is_counted_by_the_loop() -> None:
    model = build("mamba").eval()
    vector = vector_for(model, scope="generated").at(2.0)
    steering = steerkit.steer(model, vector)
    ids, told = torch.tensor([LONG]), Decoding([6])
    with torch.no_grad(), steering, steering.decoding(told):
        first = model(ids[:, :6], use_cache=True)
        assert told.columns == 6
        second = model(ids[:, 6:7], cache_params=first.cache_params, use_cache=True)
    with torch.no_grad(), steerkit.steer(model, vector, prompt_lengths=6):
        whole = model(ids[:, :7]).logits
    torch.testing.assert_close(second.logits[0, -1], whole[0, -1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[0, -1], model(ids[:, :7]).logits[0, -1], atol=1e-3)


def test_what_is_told_has_to_fit() -> None:
    model = build("llama").eval()
    steering = steerkit.steer(model, vector_for(model, scope="response"))
    with pytest.raises(ModelError, match="is not active"):
        steering.decoding(Decoding([3]))
    with steering, steering.decoding(Decoding([3, 3])), pytest.raises(ScopeError, match="told of 2 rows"):
        model(torch.tensor([LONG]))
    for wrong in (([], None), ([0], None), ([3], [[1], [2]])):
        with pytest.raises(ScopeError, match="decoding: got prompts"):
            Decoding(*wrong)
    with steering, pytest.raises(ScopeError, match="cannot tell where the prompt ends"):
        model(torch.tensor([LONG]))  # nothing of what was told is left


def test_a_window_of_one_row_does_not_ask_for_longer_prompts_of_others() -> None:
    model = build("llama").eval()
    window = vector_for(model, scope="front").at(1.0)
    ids, mask = modes.rows_of([LONG, SHORT[:2]])
    with torch.no_grad(), steerkit.steer(model, [[window], None], prompt_lengths=[len(LONG), 2]):
        model(ids, attention_mask=mask)
    with steerkit.steer(model, [None, [window]], prompt_lengths=[len(LONG), 2]), pytest.raises(ScopeError):
        model(ids, attention_mask=mask)


def test_planned_rows_are_what_steer_makes_of_them() -> None:
    model = build("llama").eval()
    a, b, c = (vector_for(model, scope="all", seed=seed) for seed in range(3))
    plans = RowPlans(model)
    rows = [[a.at(1.0), b.at(0.5)], [], [b.at(2.0), a.at(-1.0)], [c.at(1.5)]]
    planned = [plans.add(one) for one in rows]
    assert plans.count == 3
    ids = torch.tensor([LONG] * 4)
    with torch.no_grad(), steerkit.steer(model, [row or None for row in rows]):
        expected = model(ids).logits
    for _ in range(2):
        steering = plans.steering(planned)
        assert steering is not None
        with torch.no_grad(), steering:
            assert torch.equal(model(ids).logits, expected)
    assert plans.steering([plans.unsteered] * 2) is None
    assert planned[0].key != planned[2].key
    assert planned[1].key == plans.unsteered.key == ()
    with pytest.raises(StrengthError, match="has one strength"):
        plans.add([a.at([1.0, 2.0])])


def test_plans_do_not_pile_up() -> None:
    model = build("llama").eval()
    vector = vector_for(model, scope="all")
    plans = RowPlans(model, most=3)
    rows = [plans.add([vector.at(1.0, scope=f"first({n})"), vector.at(2.0)]) for n in range(1, 6)]
    assert plans.count == 3
    assert plans.add([vector.at(2.0)]).key == rows[0].key[1:]
    assert plans.steering(rows) is not None  # what was dropped still serves the rows that have it


SETTLED = {"all": 9, "prompt": 5, "response": 4, "generated": 5, "first(2)": 9, "response(1:3)": 4, "front": 0}


@pytest.mark.parametrize("scope", SETTLED)
def test_what_of_a_text_stays_as_it_is_behind_it(scope: str) -> None:
    model = build("llama").eval()
    row = RowPlans(model).add([vector_for(model, scope=scope).at(1.0)])
    assert row.settled(5, 9) == SETTLED[scope]
