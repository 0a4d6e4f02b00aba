"""Vision-language models answer about an image, steered: every scope, cached and not, against hooks by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import steerkit
from steerkit.network.decoder import find_decoder
from tests import modes
from tests.by_hand import adding, blocks_of, columns_of
from tests.families import BLOCKS, GROUPED, HIDDEN, QUIET, build
from tests.pairwise import pairwise
from tests.prompts.test_chat_roles import expected
from tests.tiny_tokenizers import TEMPLATES, byte_tokenizer

IMAGE, START, END = 300, 301, 302  # beyond the tokenizer's ids
NEW = 5
PLAIN = ("response", "all", "prompt", "generated", "first(4)")
ROLES = ("assistant", "answer", "after(0)")
TOKENIZER = byte_tokenizer(TEMPLATES["chatml"])
VISION: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,  # as deep as the text part
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def _llava() -> Any:
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**GROUPED, **QUIET),
        vision_config=tf.CLIPVisionConfig(**VISION),
        image_token_id=IMAGE,
    )
    return tf.LlavaForConditionalGeneration(config)


def _qwen() -> Any:
    vision = {"depth": 2, "hidden_size": HIDDEN, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": HIDDEN}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = tf.Qwen2_5_VLConfig(
        text_config={**GROUPED, **QUIET, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 4, "fullatt_block_indexes": [1], "window_size": 16},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def _smolvlm() -> Any:
    config = tf.SmolVLMConfig(
        text_config=tf.LlamaConfig(**GROUPED, **QUIET), vision_config=VISION, image_token_id=IMAGE, scale_factor=2
    )
    return tf.SmolVLMForConditionalGeneration(config)


def _pixels(batch: int, *, images: bool = False) -> Tensor:
    drawn = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return drawn[:, None] if images else drawn


def _patches(batch: int) -> dict[str, Tensor]:
    """Qwen's processor lays the patches of all images out in one list of rows: two frames, three colours."""
    drawn = torch.randn(16 * batch, 2 * 3 * 4 * 4, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": drawn, "image_grid_thw": torch.tensor([[1, 4, 4]] * batch)}


def _seen_by(name: str, batch: int, ids: Tensor) -> dict[str, Tensor]:
    if name == "qwen2_5_vl":
        return {**_patches(batch), "mm_token_type_ids": (ids == IMAGE).long()}
    if name == "gemma3":
        return {"pixel_values": _pixels(batch), "token_type_ids": (ids == IMAGE).long()}
    return {"pixel_values": _pixels(batch, images=name == "smolvlm")}


# By name: how it is made, and the tokens that stand for one image of sixteen patches.
MODELS: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "llava": (_llava, [IMAGE] * 16),
    "qwen2_5_vl": (_qwen, [START, *[IMAGE] * 4, END]),
    "gemma3": (lambda: build("gemma3_vlm"), [START, *[IMAGE] * 4, END]),
    "smolvlm": (_smolvlm, [IMAGE] * 4),
}


@functools.cache
def model_of(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name][0]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def prompts(name: str) -> list[list[int]]:
    """Two chats about an image each, of unequal length, up to where the assistant speaks."""
    image, rows = MODELS[name][1], []
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
        **_seen_by(name, len(ids), ids),
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


@pytest.mark.parametrize(("name", "scope", "use_cache"), pairwise(list(MODELS), [*PLAIN, *ROLES], [True, False]))
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


@pytest.mark.parametrize("name", MODELS)
def test_the_image_is_seen_and_the_text_part_is_steered(name: str) -> None:
    model = model_of(name)
    blocks = find_decoder(model).blocks
    assert blocks is blocks_of(model)
    assert not any("vision" in type(block).__name__.lower() for block in blocks)
    ids, _ = modes.rows_of(prompts(name)[:1])
    given = _seen_by(name, 1, ids)
    with torch.no_grad():
        seen, blank = (
            model(input_ids=ids, **{**given, "pixel_values": pixels}).logits
            for pixels in (given["pixel_values"], torch.zeros_like(given["pixel_values"]))
        )
    assert not torch.allclose(seen[0, -1], blank[0, -1], atol=1e-4)
