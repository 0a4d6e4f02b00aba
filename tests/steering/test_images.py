"""Vision-language models answer about an image, steered: every scope, cached and not, against hooks by hand."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.network.decoder import find_decoder
from tests import modes
from tests.by_hand import adding, blocks_of, columns_of
from tests.image_models import END, FURTHER_SEEING, IMAGE, SEEING, START, phi4_multimodal
from tests.pairwise import pairwise
from tests.prompts.test_chat_roles import expected
from tests.tiny_tokenizers import TEMPLATES, byte_tokenizer

NEW = 5
PLAIN = ("response", "all", "prompt", "generated", "first(4)")
ROLES = ("assistant", "answer", "after(0)")
SCOPES = [*PLAIN, *ROLES]
TOKENIZER = byte_tokenizer(TEMPLATES["chatml"])
MODELS = {**SEEING, **FURTHER_SEEING}


@functools.cache
def model_of(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name].build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def prompts(name: str) -> list[list[int]]:
    """Two chats about an image each, of unequal length, up to where the assistant speaks."""
    image, rows = MODELS[name].tokens, []
    for question in ("What is it?", "Look. And who is that?"):
        text = TOKENIZER.apply_chat_template(
            [{"role": "user", "content": f"%{question}"}], tokenize=False, add_generation_prompt=True
        )
        before, after = (TOKENIZER(part, add_special_tokens=False)["input_ids"] for part in text.split("%"))
        rows.append([*before, *image, *after])
    return rows


@torch.no_grad()
def answered(name: str, use_cache: bool) -> tuple[Tensor, Tensor]:
    """The texts [b, t] with their answers, and the logits [b, NEW, v] behind these."""
    ids, mask = modes.rows_of(prompts(name))
    out = model_of(name).generate(
        input_ids=ids,
        attention_mask=mask,
        **MODELS[name].given(len(ids), ids),
        use_cache=use_cache,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=modes.PAD,
        suppress_tokens=[IMAGE, START, END],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


def meant(scope: str, name: str, sequences: Tensor) -> Tensor:
    """Which tokens [b, t] of the answered texts a scope means."""
    rows = prompts(name)
    width = max(map(len, rows))
    first = torch.tensor([width - len(row) for row in rows])
    if scope in PLAIN:
        return columns_of(scope, first, width, width + NEW)
    written = torch.zeros(sequences.shape, dtype=torch.bool)
    for row, start in enumerate(first.tolist()):
        written[row, start:] = torch.tensor(expected("chatml", TOKENIZER, scope, sequences[row, start:].tolist()))
    return written


@pytest.mark.parametrize(
    ("name", "scope", "use_cache"),
    [
        *pairwise(list(SEEING), SCOPES, [True, False]),
        ("kosmos2", "response", False),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in itertools.product(FURTHER_SEEING, SCOPES, [True, False])
        ),
    ],
)
def test_an_image_is_answered_as_by_hand(name: str, scope: str, use_cache: bool) -> None:
    model = model_of(name)
    vector = modes.vector_for(model, scope="all")
    plain = answered(name, use_cache)[1]
    with steerkit.steer(model, vector, scope=scope, tokenizer=TOKENIZER if scope in ROLES else None):
        sequences, logits = answered(name, use_cache)
    direction = vector.tensors[f"{modes.RESID}/direction"]
    with adding(blocks_of(model)[modes.RESID.layer], direction, meant(scope, name, sequences)):
        texts, right = answered(name, use_cache)
    assert torch.equal(sequences, texts)
    assert float((logits - right).abs().max() / right.abs().max()) < 1e-6
    assert float((plain - right).abs().max() / right.abs().max()) > 1e-3


@pytest.mark.parametrize("name", [*SEEING, *(pytest.param(name, marks=pytest.mark.slow) for name in FURTHER_SEEING)])
def test_the_image_is_seen_and_the_text_part_is_steered(name: str) -> None:
    model = model_of(name)
    blocks = find_decoder(model).blocks
    assert blocks is blocks_of(model)
    assert not any("vision" in type(block).__name__.lower() for block in blocks)
    ids, _ = modes.rows_of(prompts(name)[:1])
    given = MODELS[name].given(1, ids)
    shown = next(name for name in ("pixel_values", "input_features") if name in given)
    with torch.no_grad():  # an image of zeros counts as none in Idefics
        seen, blank = (
            model(input_ids=ids, **{**given, shown: values}).logits
            for values in (given[shown], torch.full_like(given[shown], 0.1))
        )
    assert not torch.allclose(seen[0, -1], blank[0, -1], atol=1e-4)


def test_blocks_are_told_from_towers_of_the_same_depth() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = phi4_multimodal().eval()
    assert find_decoder(model).blocks is model.model.layers
    vector, ids = modes.vector_for(model, scope="all"), torch.tensor([modes.SHORT])
    with torch.no_grad():
        with steerkit.steer(model, vector):
            found = model(input_ids=ids).logits
        with adding(model.model.layers[1], vector.tensors[f"{modes.RESID}/direction"], torch.ones_like(ids).bool()):
            assert torch.equal(found, model(input_ids=ids).logits)


def test_embeddings_with_their_ids_are_told_by_role() -> None:
    """`generate` takes both, and feeds the embeddings alone."""
    model, (ids, mask) = model_of("llava"), modes.rows_of([[5, *prompts("llava")[0][-12:]]])
    vector = modes.vector_for(model, scope="all")
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": modes.PAD}

    def answer(**given: Tensor) -> Tensor:
        with torch.no_grad(), steerkit.steer(model, vector, scope="answer", tokenizer=TOKENIZER):
            return model.generate(**given, **options)[:, -NEW:]

    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(answer(input_ids=ids, inputs_embeds=embedded), answer(input_ids=ids))
    with pytest.raises(steerkit.errors.ScopeError, match="no token ids"):
        answer(inputs_embeds=embedded)
