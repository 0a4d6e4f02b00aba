"""Gemma 3 270M, the second real model: massive activations, norms behind attention and MLP, no chat template."""

from __future__ import annotations

from typing import Any

import torch

import steerkit
from steerkit.activations.recording import record
from steerkit.network.sites import Site
from tests.by_hand import stream_of

TEXTS = ["The harbour was quiet after the storm.", "She counted the coins twice and sighed.", "Rain fell on the roof."]


def test_the_second_model_is_what_the_first_is_not(gemma: tuple[Any, Any]) -> None:
    model, tokenizer = gemma
    assert tokenizer.chat_template is None
    assert model.config.num_hidden_layers == 18
    found = record(model, tokenizer, TEXTS, ["resid_post.0", "resid_post.12", "resid_post.17"], readout="mean")
    rows = found["resid_post.12"].double().pow(2)
    assert rows.mean(0).argmax() == 163
    assert (rows[:, 163] / rows.sum(1)).min() > 0.8  # one dimension of 640
    norms = [found.norms[Site(layer)] for layer in (0, 12, 17)]
    assert norms[0] < 200 and norms[2] > 100 * norms[0]


def test_it_is_steered_as_by_hand(gemma: tuple[Any, Any]) -> None:
    model, tokenizer = gemma
    data = steerkit.ContrastSet.from_prompts(["I love this", "What joy"], ["I hate this", "What pain"], raw=True)
    vector = steerkit.fit(model, tokenizer, data, layers=[9]).at(scope="all")
    direction = vector.tensors["resid_post.9/direction"]
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids

    def add(_module: Any, _args: Any, output: Any) -> Any:
        moved = stream_of(output) + 2.0 * direction
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    with torch.no_grad():
        plain = model(input_ids=ids).logits
        handle = model.model.layers[9].register_forward_hook(add)
        by_hand = model(input_ids=ids).logits
        handle.remove()
        with steerkit.steer(model, vector, 2.0):
            steered = model(input_ids=ids).logits
    assert torch.equal(steered, by_hand)
    assert not torch.allclose(steered, plain, atol=0.1)
