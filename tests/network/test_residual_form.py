"""What passes between the blocks is seen before a site is given out: one stream, or a refusal that names the form."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from steerkit.errors import SiteError
from steerkit.network.decoder import find_decoder
from steerkit.network.residual_form import TOKENS, form_of, form_text, is_token_wise
from steerkit.network.sites import KINDS, Site
from steerkit.network.tap import anatomies, locate
from steerkit.network.writers import every_write, writing_matrices
from tests.families import BLOCKS, GROUPED, HIDDEN, build, shortened

family = lru_cache(maxsize=None)(build)

HYPER = {
    "attn_in": "input_layernorm",
    "attn_raw": "self_attn",
    "mlp_in": "post_attention_layernorm",
    "mlp_raw": "mlp",
}
# Of families with several streams: what passes between the blocks, and the modules of block 1 that can be steered.
FORMS: dict[str, tuple[str, dict[str, str]]] = {
    "deepseek_v4": ("[b, t, 4, 32]", {**HYPER, "z": "self_attn.o_b_proj"}),
    "hy_v4": ("[b, t, 4, 32]", {**HYPER, "z": "self_attn.o_proj"}),
    "qwen4_exp": ("[b, t, 128]", {"attn_raw": "self_attn", "z": "self_attn.o_proj", "mlp_raw": "mlp"}),
    "gemma3n": ("[4, b, t, 32]", {"attn_in": "input_layernorm", "attn_raw": "self_attn", "z": "self_attn.o_proj"}),
}
STREAM = ("resid_pre", "resid_post")


@pytest.mark.parametrize("name", FORMS)
def test_several_streams_are_refused_by_their_form(name: str) -> None:
    form, inside = FORMS[name]
    model = family(name)
    for kind in (*STREAM, "attn_out"):
        with pytest.raises(SiteError) as caught:
            locate(model, [Site(1, kind)])
        message = str(caught.value)
        assert message.startswith(
            f"{kind}.1: {form} passes between the blocks, 4 residual streams of width 32; "
            "steerkit steers one stream [b, t, 32], so ask for "
        )
        assert message.endswith(f"inside the block (block 1 of {type(model).__name__})")
        assert "\n" not in message
        assert {
            place.removesuffix(".1") for place in message.split("ask for ")[1].split(" inside")[0].split(" or ")
        } == {*inside}


@pytest.mark.parametrize("name", FORMS)
def test_what_is_given_out_inside_such_a_block_is_one_vector_for_each_token(name: str) -> None:
    inside = FORMS[name][1]
    model = family(name)
    taps = locate(model, [Site(1, kind) for kind in inside])
    assert {site.kind: tap.name.removeprefix("model.layers.1.") for site, tap in taps.items()} == inside
    seen = {}
    handles = [
        tap.module.register_forward_hook(
            lambda _m, args, kwargs, out, tap=tap: seen.update({tap.site: tap.read(args, kwargs, out)}),
            with_kwargs=True,
        )
        for tap in taps.values()
    ]
    with torch.no_grad():
        model(input_ids=torch.randint(10, 300, (2, 7)), use_cache=False)
    for handle in handles:
        handle.remove()
    assert {site: tuple(tensor.shape) for site, tensor in seen.items()} == {
        site: (2, 7, tap.width) for site, tap in taps.items()
    }
    for kind in set(KINDS) - set(inside) - {*STREAM, "router"}:
        with pytest.raises(SiteError):
            locate(model, [Site(1, kind)])


@pytest.mark.parametrize("name", FORMS)
def test_nothing_writes_to_one_stream_where_there_are_several(name: str) -> None:
    decoder = find_decoder(family(name))
    for find in (every_write, writing_matrices):
        with pytest.raises(SiteError):
            find(decoder)
    anatomy = anatomies(decoder, {1})[1]
    for half in anatomy.halves:
        with pytest.raises(SiteError):
            anatomy.projection(half)


def test_the_form_is_seen_once_in_a_model_s_life() -> None:
    model: Any = build("llama")
    ran = []
    model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    for layer in (0, 3, 0):
        locate(model, [Site(layer), Site(layer, "resid_pre")])
    assert len(ran) == 1
    locate(shortened(model, 2), [Site(1)])  # the same blocks
    assert len(ran) == 1
    model.model.layers[1] = build("llama", seed=1).model.layers[1]
    locate(model, [Site(1)])
    assert len(ran) == 2


def test_one_pass_shows_the_form_and_every_place_that_is_asked() -> None:
    model: Any = build("llama")
    ran = []
    model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    asked = [Site(layer, kind) for layer in (0, 2) for kind in ("resid_post", "attn_out", "mlp_in")]
    assert set(locate(model, asked)) == set(asked)
    assert len(ran) == 1
    locate(model, [*asked, Site(3)])  # the form of blocks that were not asked is known too
    assert len(ran) == 1
    locate(model, [Site(3, "mlp_out")])
    assert len(ran) == 2


class Widened(nn.Module):
    """A block that gives half of its channels twice."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: torch.Tensor, **inputs: Any) -> torch.Tensor:
        given = self.block(hidden_states, **inputs)
        return torch.cat([given, given[..., :16]], dim=-1)


def test_blocks_of_another_width_than_the_config_says_are_refused() -> None:
    model: Any = build("llama")
    model.model.layers[2] = Widened(model.model.layers[2])
    model.model.layers[3].register_forward_pre_hook(lambda _m, args: (args[0][..., :HIDDEN], *args[1:]))
    with pytest.raises(SiteError, match=r"resid_post\.2: \[b, t, 48\] passes between the blocks, no such stream"):
        locate(model, [Site(2)])
    assert len(locate(model, [Site(1), Site(2, "resid_pre")])) == 2


def test_a_block_that_runs_twice_in_a_pass_is_refused() -> None:
    model: Any = build("llama")
    first, second = model.model.layers[1:3]

    def once_more(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (first(*args, **kwargs), *args[1:]), kwargs

    second.register_forward_pre_hook(once_more, with_kwargs=True)
    for kind in ("resid_post", "resid_pre", "mlp_out"):
        with pytest.raises(SiteError, match=rf"{kind}\.1: block 1 of LlamaForCausalLM runs 2 times in a pass"):
            locate(model, [Site(1, kind)])
    assert len(locate(model, [Site(0), Site(2)])) == 2


def test_a_block_that_does_not_run_on_plain_text_may_be_steered() -> None:
    """Mllama's blocks that look at an image are passed by without one."""
    config = tf.MllamaTextConfig(**GROUPED, cross_attention_layers=[1], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = tf.MllamaForCausalLM(config).eval()
    assert not form_of(find_decoder(model), 1).gave
    assert len(locate(model, [Site(1), Site(2)])) == 2


def test_shapes_in_words() -> None:
    assert form_text((4, 1, TOKENS, 32)) == "[4, b, t, 32]"
    assert is_token_wise((1, TOKENS, 48)) and not is_token_wise((1, TOKENS, 48), 32)
    assert not is_token_wise((TOKENS, 1, 32)) and not is_token_wise((TOKENS, 32)) and not is_token_wise(())


# Depth


def test_cache_slots_are_not_taken_for_blocks() -> None:
    model = family("longcat_flash")
    assert model.config.num_hidden_layers == 2 * BLOCKS
    decoder = find_decoder(model)
    assert (decoder.path, decoder.num_layers) == ("model.layers", BLOCKS)
    assert len(locate(model, [Site(layer) for layer in range(BLOCKS)])) == BLOCKS
    with pytest.raises(SiteError, match=r"layer 4 is outside 0\.\.3 of LongcatFlashForCausalLM \(4 layers\)"):
        locate(model, [Site(BLOCKS)])


def test_blocks_that_run_several_times_are_refused_with_their_slots() -> None:
    with pytest.raises(SiteError) as caught:
        find_decoder(family("hrm_text"))
    lists = "says 12 blocks, but its module lists are: L_module.layers (4), H_module.layers (4)"
    slots = "if it counts cache slots of blocks that run several times in a pass, no block is one layer"
    assert str(caught.value) == f"the config of HrmTextForCausalLM {lists}; {slots}"


def test_a_model_without_some_of_its_blocks_is_not_taken_for_one_with_slots() -> None:
    for blocks in (2, 3):
        model: Any = build("llama")
        model.model.layers = model.model.layers[:blocks]
        with pytest.raises(SiteError, match=rf"says 4 blocks, but its module lists are: layers \({blocks}\)"):
            find_decoder(model)
