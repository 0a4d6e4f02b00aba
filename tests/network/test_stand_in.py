"""An architecture without weights: it has the sites of the model, and next to none of its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import steerkit
from steerkit.activations.reading import read_passes
from steerkit.errors import FitError, ModelError
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.network.stand_in import stand_in
from steerkit.network.tap import locate
from steerkit.prompts.contrast_set import ContrastSet
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

DATA = ContrastSet.from_answers(
    [("Was it a good day?", "It was wonderful.", "It was terrible."), ("And the food?", "Delicious!", "Disgusting.")]
)
HELD_OUT = ContrastSet.from_answers([("How is the soup?", "Warm and good.", "Cold and sour.")])
ONE_PAIR = ContrastSet.from_prompts(["Love"], ["Hate"], raw=True)
KINDS = ("resid_post", "attn_out", "mlp_out")
SOME = ("llama", "gemma3_vlm", "gpt2", "falcon", "qwen3_moe", "gpt_oss", "olmo2", "cohere")


@pytest.mark.parametrize("family", SOME)
def test_the_sites_of_the_model(family: str) -> None:
    model = build(family)
    other = stand_in(model.config.get_text_config())
    sites = [Site(layer, kind) for layer in (0, 3) for kind in KINDS]
    wanted, found = locate(model, sites), locate(other, sites)
    assert list(found) == list(wanted)
    assert [tap.width for tap in found.values()] == [tap.width for tap in wanted.values()]
    assert find_decoder(other).num_layers == find_decoder(model).num_layers


def test_it_takes_the_memory_of_its_largest_weight() -> None:
    model = stand_in(build("llama").config)
    shapes = {name: one.shape for name, one in build("llama").named_parameters()}
    assert {name: one.shape for name, one in model.named_parameters()} == shapes
    (storage,) = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in model.parameters()}.values()
    assert storage.nbytes() <= 4 * (max(map(torch.Size.numel, shapes.values())) + 2**16)


def test_what_transformers_does_not_build() -> None:
    with pytest.raises(ModelError, match=r"^t5: transformers builds no decoder"):
        stand_in(tf.T5Config())


def _elsewhere(model: Any) -> Any:
    """What runs texts on a model while a stand-in of it is fitted."""

    def reads(_decoder: Any, taps: Any, *args: Any, **how: Any) -> Any:
        return read_passes(find_decoder(model), locate(model, taps), *args, **how)

    return reads


@pytest.mark.parametrize("method", ["caa", "repe", "ablation", "set_projection"])
def test_a_fit_while_the_weights_run_elsewhere(method: str) -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    how: dict[str, Any] = {"layers": [1], "method": method, "held_out": HELD_OUT}
    wanted = steerkit.fit(model, tokenizer, DATA, **how)
    found = steerkit.fit(stand_in(model.config), tokenizer, DATA, reads=_elsewhere(model), **how)
    assert found.digest == wanted.digest
    assert found.held_out == wanted.held_out


@pytest.mark.parametrize("method", ["conditional", "controller", "steer2edit", "actadd", "refusal"])
def test_methods_that_ask_more_than_activations_are_refused(method: str) -> None:
    model, data = build("llama"), ONE_PAIR if method == "actadd" else DATA
    settings = {"source": "unembedding"} if method == "refusal" else {}
    with pytest.raises(FitError, match=f"{method}: asks more of the model than activations"):
        steerkit.fit(
            stand_in(model.config),
            byte_tokenizer(CHATML),
            data,
            method=method,
            settings=settings,
            reads=_elsewhere(model),
        )
