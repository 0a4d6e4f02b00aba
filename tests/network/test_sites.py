"""Where each tensor is, in every family; what is refused and why; and that looking changes nothing."""

from __future__ import annotations

import contextlib
from collections import namedtuple
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

import steerkit
from steerkit.errors import SiteError
from steerkit.network.anatomy import Anatomy
from steerkit.network.decoder import find_decoder, inner_model
from steerkit.network.sites import KIND_HELP, KINDS, Site, layers_text, parse_layers, sites_text
from steerkit.network.tap import Tap, anatomies, locate
from tests.choices import mostly_slow
from tests.families import BLOCKS, FAMILIES, FURTHER, GROUPED, HIDDEN, QUIET, VOCAB, build
from tests.modes import vector_for
from tests.tiny_tokenizers import byte_tokenizer

family = lru_cache(maxsize=None)(build)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """Models this small run several times faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# The table. A name is a module inside the block; `I name` is what it reads, otherwise what it gives; `2-D` is flat.
# A kind that is missing stands in REFUSED.

LLAMA = {
    "attn_in": "input_layernorm",
    "mlp_in": "post_attention_layernorm",
    "attn_out": "self_attn",
    "mlp_out": "mlp",
    "z": "I self_attn.o_proj",
    "mlp_post": "I mlp.down_proj",
}
GEMMA = {
    "attn_in": "input_layernorm",
    "mlp_in": "pre_feedforward_layernorm",
    "attn_out": "post_attention_layernorm",
    "attn_raw": "self_attn",
    "mlp_out": "post_feedforward_layernorm",
    "mlp_raw": "mlp",
    "z": "I self_attn.o_proj",
    "mlp_post": "I mlp.down_proj",
}
EXPERTS = {**{kind: name for kind, name in LLAMA.items() if kind != "mlp_post"}, "router": "mlp.gate 2-D"}
FALCON = {
    "attn_out": "self_attention",
    "mlp_out": "mlp",
    "z": "I self_attention.dense",
    "mlp_post": "I mlp.dense_4h_to_h",
}
OPT_POST = {"attn_out": "self_attn", "mlp_out": "fc2 2-D", "z": "I self_attn.out_proj", "mlp_post": "I fc2 2-D"}

# By family and block; in Qwen3-Next block 0 mixes tokens by linear attention, block 1 by attention.
TABLE: dict[tuple[str, int], dict[str, str]] = {
    **{(name, 1): LLAMA for name in ("llama", "mistral", "qwen2", "qwen3", "llama_peft")},
    **{(name, 1): GEMMA for name in ("gemma2", "gemma3_text", "gemma3_vlm")},
    # Phi-3 has modules for the dropout after each half: what they give is what is added, in training too.
    ("phi3", 1): {**LLAMA, "attn_out": "resid_attn_dropout", "mlp_out": "resid_mlp_dropout"},
    ("gpt2", 1): {
        "attn_in": "ln_1",
        "mlp_in": "ln_2",
        "attn_out": "attn",
        "mlp_out": "mlp",
        "z": "I attn.c_proj",
        "mlp_post": "I mlp.c_proj",
    },
    ("gpt_neox", 1): {
        "attn_in": "input_layernorm",
        "mlp_in": "post_attention_layernorm",
        "attn_out": "post_attention_dropout",
        "mlp_out": "post_mlp_dropout",
        "z": "I attention.dense",
        "mlp_post": "I mlp.dense_4h_to_h",
    },
    ("opt", 1): {**OPT_POST, "attn_in": "self_attn_layer_norm", "mlp_in": "final_layer_norm 2-D"},
    ("opt_post", 1): OPT_POST,
    ("falcon", 1): {**FALCON, "block_in": "input_layernorm"},
    ("falcon_new", 1): {**FALCON, "attn_in": "ln_attn", "mlp_in": "ln_mlp"},
    ("bloom", 1): {
        "attn_in": "input_layernorm",
        "mlp_in": "post_attention_layernorm",
        "attn_out": "self_attention.dense",
        "mlp_out": "mlp.dense_4h_to_h",
        "z": "I self_attention.dense",
        "mlp_post": "I mlp.dense_4h_to_h",
    },
    **{(name, 1): EXPERTS for name in ("mixtral", "qwen3_moe", "qwen3_next")},
    ("gpt_oss", 1): {**EXPERTS, "router": "mlp.router 2-D"},
    ("qwen3_next", 0): {
        "attn_in": "input_layernorm",
        "mlp_in": "post_attention_layernorm",
        "mixer_out": "linear_attn",
        "mlp_out": "mlp",
        "z": "I linear_attn.out_proj",
        "router": "mlp.gate 2-D",
    },
    ("mamba", 1): {"block_in": "norm", "mixer_out": "mixer"},
    ("olmo2", 1): {kind: name for kind, name in GEMMA.items() if not kind.endswith("_in")},
    ("cohere", 1): {
        "block_in": "input_layernorm",
        **{kind: name for kind, name in LLAMA.items() if not kind.endswith("_in")},
    },
}

OWN_NORMS = {"block_in": "each half reads a norm of its own; ask for attn_in or mlp_in"}
NO_MIXER = {"mixer_out": "is attention; ask for attn_out.1"}
ONE_NORM = dict.fromkeys(("attn_in", "mlp_in"), "read; ask for block_in.1")
ROUTED = {"mlp_post": "`mlp` routes tokens to `mlp.experts`"}
NO_MLP = "the block has no MLP, only `mixer`; ask for mixer_out.1"
NO_PRE_NORM = dict.fromkeys(("attn_in", "block_in"), "`self_attn` reads resid_pre.1 itself; there is no norm before it")
DENSE = {"router": "routes no tokens to experts"}
REFUSED: dict[tuple[str, int], dict[str, str]] = {
    **{place: OWN_NORMS | NO_MIXER | DENSE for place in TABLE},
    **{(name, 1): OWN_NORMS | NO_MIXER | ROUTED for name in ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_next")},
    **{(name, 1): NO_MIXER | ONE_NORM | DENSE for name in ("falcon", "cohere")},
    ("opt_post", 1): NO_MIXER
    | DENSE
    | NO_PRE_NORM
    | {"mlp_in": "`fc1` to `fc2` reads the output of `self_attn_layer_norm`, which is the residual stream itself"},
    ("olmo2", 1): NO_MIXER
    | NO_PRE_NORM
    | DENSE
    | {"mlp_in": "`mlp` reads the residual stream, which no module gives out"},
    ("qwen3_next", 0): OWN_NORMS
    | ROUTED
    | dict.fromkeys(("attn_out", "attn_raw"), "linear-attention module, not attention; ask for mixer_out.0"),
    ("mamba", 1): dict.fromkeys(("mlp_in", "mlp_out", "mlp_raw", "mlp_post", "router"), NO_MLP)
    | dict.fromkeys(("attn_out", "attn_raw"), "not attention; ask for mixer_out.1")
    | {"attn_in": "`norm` is all that `mixer` read; ask for block_in.1", "z": "has no heads; ask for mixer_out.1"},
}

PREFIX = {
    "gemma3_vlm": "model.language_model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "opt_post": "model.decoder.layers",
    "falcon": "transformer.h",
    "falcon_new": "transformer.h",
    "bloom": "transformer.h",
    "mamba": "backbone.layers",
}


def describe(taps: dict[Site, Tap], prefix: str) -> dict[str, str]:
    """The taps of one layer in the words of the table."""
    words = {}
    for site, tap in taps.items():
        name = tap.name.removeprefix(f"{prefix}.{site.layer}").removeprefix(".")
        words[site.kind] = ("I " if tap.side == "input" else "") + name + (" 2-D" if tap.flat else "")
    return words


def ids(seed: int = 0, batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(10, VOCAB - 30, (batch, length), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def captured(taps: dict[Site, Tap], *, clone: bool = True) -> Any:
    """Read every tap with plain hooks, during the passes run inside."""
    seen: dict[Site, torch.Tensor] = {}
    handles = []

    def keep(site: Site, tensor: torch.Tensor) -> None:
        seen[site] = tensor.detach().clone() if clone else tensor

    for site, tap in taps.items():
        if tap.side == "input":

            def before(_module: Any, args: Any, kwargs: Any, site: Site = site, tap: Tap = tap) -> None:
                keep(site, tap.read(args, kwargs))

            handles.append(tap.module.register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(_module: Any, args: Any, kwargs: Any, output: Any, site: Site = site, tap: Tap = tap) -> None:
                keep(site, tap.read(args, kwargs, output))

            handles.append(tap.module.register_forward_hook(after, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def moved(site: Site, tensor: torch.Tensor) -> torch.Tensor:
    """Plus one; a router has no more experts than slots, so their weights are doubled."""
    return tensor * 2 if site.kind == "router" else tensor + 1


@contextlib.contextmanager
def shifted(tap: Tap) -> Any:
    """Write the tap's tensor `moved`, during the passes run inside."""

    def before(_module: Any, args: Any, kwargs: Any) -> Any:
        return tap.write_input(args, kwargs, moved(tap.site, tap.read(args, kwargs)))

    def after(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return tap.write_output(output, moved(tap.site, tap.read(args, kwargs, output)))

    if tap.side == "input":
        handle = tap.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = tap.module.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def run(model: Any, input_ids: torch.Tensor | None = None, **options: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=ids() if input_ids is None else input_ids, **options)


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_every_kind_has_help_and_a_text_form() -> None:
    assert tuple(KIND_HELP) == KINDS
    for kind in KINDS:
        assert Site.parse(f"{kind}.12") == Site(12, kind)
        assert str(Site(12, kind)) == f"{kind}.12"
    assert Site(3) == Site(3, "resid_post")
    assert sorted([Site(10), Site(2, "z"), Site(2)]) == [Site(2), Site(2, "z"), Site(10)]


@pytest.mark.parametrize("text", ["resid_post", "12", "resid_post.", "resid_post.-1", "resid_post.1.2", "resid_post.x"])
def test_a_site_that_cannot_be_read_is_quoted(text: str) -> None:
    with pytest.raises(SiteError, match=r"is not a site; write <kind>\.<layer>, such as resid_post\.12"):
        Site.parse(text)


def test_an_unknown_kind_gets_near_misses() -> None:
    with pytest.raises(SiteError, match=r"unknown kind of site 'resid_pots'; did you mean .*'resid_post'"):
        Site.parse("resid_pots.3")
    for layer in (-1, True, 1.5):
        with pytest.raises(SiteError, match="a layer is a whole number from 0"):
            Site(layer)  # type: ignore[arg-type]


def test_layers_are_read_with_both_ends() -> None:
    assert parse_layers("10-14", 30) == [10, 11, 12, 13, 14]
    assert parse_layers("11,13", 30) == [11, 13]
    assert parse_layers(" 0 - 2 , 7", 30) == [0, 1, 2, 7]
    assert parse_layers([12, 11, 12], 30) == [12, 11]
    assert parse_layers(range(3), 30) == [0, 1, 2]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("30", "layer 30 is outside the model; layers go from 0 to 29"),
        ("28-31", "layer 31 is outside the model; layers go from 0 to 29"),
        ([-1], "layer -1 is outside the model; layers go from 0 to 29"),
        ("14-10", "layers 14-10 run backwards; write 10-14"),
        ("middle", "'middle' is no layer; layers go from 0 to 29; write 10-14 or 11,13"),
        ("", "'' is no layer"),
        ([], "no layers were given"),
        ([1.5], "1.5 is no layer"),
        ([True], "True is no layer"),
    ],
)
def test_layers_that_cannot_be_are_quoted(layers: Any, words: str) -> None:
    with pytest.raises(SiteError) as caught:
        parse_layers(layers, 30)
    assert words in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_the_table_covers_every_family_and_kind() -> None:
    assert {name for name, _ in TABLE} == set(FAMILIES)
    for place, found in TABLE.items():
        raws = {"attn_raw", "mlp_raw"} - set(REFUSED[place])
        assert set(found) | set(REFUSED[place]) | raws | {"resid_pre", "resid_post"} == set(KINDS), place
        assert not set(found) & set(REFUSED[place]), place


@pytest.mark.parametrize(("name", "layer"), TABLE)
def test_each_kind_is_where_the_table_says(name: str, layer: int) -> None:
    model = family(name)
    prefix = PREFIX.get(name, "model.layers")
    expected = {"resid_post": "", "resid_pre": "I ", **TABLE[name, layer]}
    taps = locate(model, [Site(layer, kind) for kind in expected])
    assert describe(taps, prefix) == expected
    assert [site.kind for site in taps] == list(expected), "the order asked"
    modules = dict(find_decoder(model).model.named_modules())
    for site, tap in taps.items():
        assert modules[tap.name] is tap.module
        assert tap.site == site
    width = {"qwen3": 64}.get(name, HIDDEN)
    assert all(tap.width == width for site, tap in taps.items() if site.kind == "z")
    assert all(tap.width == HIDDEN for site, tap in taps.items() if site.kind not in ("z", "mlp_post", "router"))


@pytest.mark.parametrize(("name", "layer"), TABLE)
def test_each_other_kind_is_refused_with_its_reason(name: str, layer: int) -> None:
    for kind, reason in REFUSED[name, layer].items():
        with pytest.raises(SiteError) as caught:
            locate(family(name), [Site(layer, kind)])
        message = str(caught.value)
        assert message.startswith(f"{kind}.{layer}: "), message
        assert reason in message
        assert type(find_decoder(family(name)).model).__name__ in message
        assert "\n" not in message


@pytest.mark.parametrize(("name", "layer"), TABLE)
def test_raw_is_another_name_for_out_where_no_norm_comes_after(name: str, layer: int) -> None:
    for half in ("attn", "mlp"):
        if f"{half}_raw" in TABLE[name, layer] or f"{half}_out" not in TABLE[name, layer]:
            continue
        taps = locate(family(name), [Site(layer, f"{half}_raw"), Site(layer, f"{half}_out")])
        assert list(taps) == [Site(layer, f"{half}_out")]


def test_a_layer_outside_the_model_is_refused_with_the_range() -> None:
    with pytest.raises(SiteError) as caught:
        locate(family("llama"), [Site(0), Site(40)])
    assert str(caught.value) == "resid_post.40: layer 40 is outside 0..3 of LlamaForCausalLM (4 layers)"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_decoder_is_found(name: str) -> None:
    decoder = find_decoder(family(name))
    assert decoder.path == PREFIX.get(name, "model.layers")
    assert decoder.num_layers == len(decoder.blocks) == BLOCKS
    assert decoder.hidden_size == HIDDEN
    assert decoder.model_type == decoder.model.config.model_type
    assert decoder.body is decoder.model.get_decoder()


# ---------------------------------------------------------------------------------------------------------------------
# What the tensors are, on other inputs than the probe's


def _added(name: str, layer: int) -> list[Site]:
    mixer = "mixer_out" if ("mixer_out" in TABLE.get((name, layer), TABLE[name, 1])) else "attn_out"
    return [Site(layer, mixer)] + ([] if name == "mamba" else [Site(layer, "mlp_out")])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "opt_post"])
def test_the_stream_is_the_sum_of_what_is_added(name: str) -> None:
    model = family(name)
    layers = (0, 1) if name == "qwen3_next" else (1, 3)
    sites = [site for layer in layers for site in (Site(layer, "resid_pre"), Site(layer), *_added(name, layer))]
    with captured(locate(model, sites)) as seen:
        run(model)
    for layer in layers:
        left = seen[Site(layer)]
        parts = [seen[site].reshape(left.shape) for site in _added(name, layer)]
        total = seen[Site(layer, "resid_pre")] + sum(parts)
        assert (total - left).abs().max() <= 1e-5 * left.abs().max()


def test_where_norms_come_after_the_sum_the_norm_reads_the_sum() -> None:
    model = family("opt_post")
    block: Any = find_decoder(model).blocks[1]
    norms = {
        Site(1, "attn_in"): Tap(Site(1, "attn_in"), block.self_attn_layer_norm, "", "input", flat=False, width=HIDDEN),
        Site(1, "mlp_in"): Tap(Site(1, "mlp_in"), block.final_layer_norm, "", "input", flat=False, width=HIDDEN),
    }
    with captured({**locate(model, [Site(1, "resid_pre"), *_added("opt_post", 1)]), **norms}) as seen:
        run(model)
    first = seen[Site(1, "resid_pre")] + seen[Site(1, "attn_out")]
    assert torch.allclose(first, seen[Site(1, "attn_in")], atol=1e-6)
    with torch.no_grad():
        second = block.self_attn_layer_norm(first) + seen[Site(1, "mlp_out")].reshape(first.shape)
    assert torch.allclose(second, seen[Site(1, "mlp_in")], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_input_of_a_block_is_the_output_of_the_one_before(name: str) -> None:
    model = family(name)
    with captured(locate(model, [Site(1), Site(2, "resid_pre")]), clone=False) as seen:
        run(model)
    assert seen[Site(1)] is seen[Site(2, "resid_pre")]


def sites_of(name: str) -> dict[Site, Tap]:
    """Every site that a further family has, by canonical name."""
    found: dict[Site, Tap] = {}
    anatomy = anatomies(find_decoder(family(name)), set(range(BLOCKS)))
    for layer in range(BLOCKS):
        kinds = [kind for kind in KINDS if kind.startswith("resid_") or has(anatomy[layer], kind)]
        found |= locate(family(name), [Site(layer, kind) for kind in kinds])
    return found


def has(anatomy: Anatomy, kind: str) -> bool:
    with contextlib.suppress(SiteError):
        return bool(anatomy.find(kind))
    return False


@pytest.mark.parametrize("name", mostly_slow(FURTHER, list(FURTHER)[::2]))
def test_sites_of_further_families_are_what_they_are_called(name: str) -> None:
    """Blocks follow each other, what halves add sums up, and what is written is what is read."""
    model, taps = family(name), sites_of(name)
    decoder = find_decoder(model)
    assert (decoder.num_layers, len(decoder.blocks), decoder.hidden_size) == (BLOCKS, BLOCKS, HIDDEN)
    with captured(taps) as before:
        plain = run(model).logits
    for layer in range(BLOCKS):
        if layer:
            assert torch.equal(before[Site(layer, "resid_pre")], before[Site(layer - 1)])
        halves = [site for site in taps if site.layer == layer and site.kind.endswith("_out")]
        mixes = any(site.kind in ("attn_out", "mixer_out") for site in halves)
        if name != "openai_gpt" and (len(halves) == 2 or (name in ("mamba2", "falcon_mamba") and mixes)):
            left = before[Site(layer)]
            total = before[Site(layer, "resid_pre")] + sum(before[site].reshape(left.shape) for site in halves)
            assert (total - left).abs().max() <= 1e-5 * left.abs().max(), layer
    for site, tap in taps.items():
        if site.layer == 1:
            with shifted(tap), captured({site: tap}) as after:
                steered = run(model).logits
            assert torch.equal(after[site], moved(site, before[site])), site
            assert not torch.equal(steered, plain), site


def test_a_head_by_the_name_of_decoder_is_not_taken_for_one() -> None:
    model = family("modernbert_decoder")
    assert isinstance(model.get_decoder(), nn.Linear)
    assert find_decoder(model).path == "model.layers"


@pytest.mark.parametrize("name", ["bloom", "falcon", "gemma2", "gpt_neox", "mamba", "olmo2", "opt_post"])
def test_the_same_places_are_found_in_bfloat16(name: str) -> None:
    model = build(name).to(torch.bfloat16)
    expected = TABLE[name, 1]
    taps = locate(model, [Site(1, kind) for kind in expected])
    assert describe(taps, PREFIX.get(name, "model.layers")) == expected


def test_a_scaled_residual_is_refused_and_the_rest_is_found() -> None:
    config = tf.GraniteConfig(**GROUPED, **QUIET, residual_multiplier=0.3)
    model = tf.GraniteForCausalLM(config).eval()
    with pytest.raises(SiteError, match=r"not its input plus the output of `self_attn` and `mlp`.*use resid_post\.2"):
        locate(model, [Site(2, "attn_out")])
    assert len(locate(model, [Site(2, "attn_in"), Site(2, "z"), Site(2, "mlp_post"), Site(2)])) == 4


def test_one_dropout_for_both_halves_is_passed_over() -> None:
    sizes = {key: value for key, value in GROUPED.items() if key != "num_key_value_heads"}
    model = tf.PhiForCausalLM(tf.PhiConfig(**sizes, **QUIET)).eval()
    taps = locate(model, [Site(1, "attn_out"), Site(1, "mlp_out"), Site(1, "block_in")])
    assert describe(taps, "model.layers") == {"attn_out": "self_attn", "mlp_out": "mlp", "block_in": "input_layernorm"}


def test_two_mixers_side_by_side_are_refused_by_name() -> None:
    mamba = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
    model = tf.FalconH1ForCausalLM(tf.FalconH1Config(**GROUPED, **QUIET, **mamba)).eval()
    for kind in ("attn_out", "mixer_out", "attn_in", "z"):
        with pytest.raises(
            SiteError, match=r"`mamba` and `self_attn` run in one block, so the name would mean several"
        ):
            locate(model, [Site(1, kind)])
    assert describe(locate(model, [Site(1, "mlp_post")]), "model.layers") == {"mlp_post": "I feed_forward.down_proj"}


def test_blocks_of_one_half_are_told_apart() -> None:
    types = ["linear_attention", "mlp", "full_attention", "mlp"]
    mamba = {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8}
    sizes = {key: value for key, value in GROUPED.items() if key != "num_hidden_layers"}
    model = tf.NemotronHForCausalLM(tf.NemotronHConfig(**sizes, **QUIET, **mamba, layers_block_type=types, head_dim=8))
    asked = "mixer_out.0 block_in.0 mlp_out.1 mlp_in.1 mlp_post.1 attn_out.2 attn_in.2 z.2"
    found = locate(model.eval(), [Site.parse(site) for site in asked.split()])
    assert [tap.name.split(".", 2)[2] for tap in found.values()] == [
        *("0.mixer", "0.norm", "1.mixer", "1.norm", "1.mixer.down_proj"),
        *("2.mixer", "2.norm", "2.mixer.o_proj"),
    ]
    for site, words in {
        Site(1, "attn_out"): "the block has no attention, only `mixer`; ask for mlp_out.1",
        Site(2, "mlp_out"): "the block has no MLP, only `mixer`; ask for attn_out.2",
    }.items():
        with pytest.raises(SiteError) as caught:
            locate(model, [site])
        assert words in str(caught.value)


def test_a_half_that_does_not_end_in_a_linear_has_no_neurons() -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "intermediate_size": 48}
    model = tf.RwkvForCausalLM(tf.RwkvConfig(**sizes, **QUIET)).eval()
    with pytest.raises(SiteError, match="`feed_forward` does not end in one linear layer that reads every token"):
        locate(model, [Site(1, "mlp_post")])


def test_dropout_does_not_hide_the_sum() -> None:
    model = tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED, **QUIET, resid_pdrop=0.5, embd_pdrop=0.5)).train()
    assert describe(locate(model, [Site(1, "mlp_out")]), "model.layers") == {"mlp_out": "resid_mlp_dropout"}
    # In training the dropout's output, not the MLP's, is what is added.
    taps = locate(model, [Site(1, kind) for kind in ("resid_pre", "resid_post", "attn_out", "mlp_out")])
    with captured(taps) as seen:
        run(model)
    parts = seen[Site(1, "attn_out")] + seen[Site(1, "mlp_out")]
    assert torch.allclose(seen[Site(1, "resid_pre")] + parts, seen[Site(1)], atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Bugs seen elsewhere


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "bloom"])
def test_bug_12_the_last_block_is_read_before_the_final_norm(name: str) -> None:
    model = build(name)
    decoder = find_decoder(model)
    sites = [Site(layer) for layer in range(BLOCKS)]
    with captured(locate(model, sites)) as seen:
        hidden = run(model, output_hidden_states=True).hidden_states
    for site in sites[:-1]:
        assert torch.equal(seen[site], hidden[site.layer + 1])
    assert not torch.allclose(seen[sites[-1]], hidden[-1])
    norm = {"opt": "final_layer_norm", "bloom": "ln_f"}.get(name, "norm")
    with torch.no_grad():
        assert torch.equal(getattr(decoder.body, norm)(seen[sites[-1]]), hidden[-1])


@pytest.mark.parametrize(("name", "layer"), TABLE)
def test_bug_13_what_is_written_at_a_site_is_what_is_read_there(name: str, layer: int) -> None:
    model = family(name)
    taps = locate(model, [Site(layer, kind) for kind in ("resid_pre", "resid_post", *TABLE[name, layer])])
    with captured(taps) as before:
        plain = run(model).logits
    for site, tap in taps.items():
        with shifted(tap), captured({site: tap}) as after:
            steered = run(model).logits
        assert torch.equal(after[site], moved(site, before[site])), site
        assert not torch.equal(steered, plain), site
    assert torch.equal(run(model).logits, plain)


def test_bug_14_the_text_tower_is_found_and_not_the_vision_tower() -> None:
    model = family("gemma3_vlm")
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    assert len([name for name in lists if len(model.get_submodule(name)) == BLOCKS]) == 2
    decoder = find_decoder(model)
    assert decoder.path == "model.language_model.layers"
    assert type(decoder.blocks[0]).__name__ == "Gemma3DecoderLayer"


def test_bug_15_hybrid_layers_keep_their_indices() -> None:
    model = family("qwen3_next")
    taps = locate(model, [Site(3, "attn_out"), Site(0, "mixer_out"), Site(1, "attn_out"), Site(2, "mixer_out")])
    assert [tap.name for tap in taps.values()] == [
        "model.layers.3.self_attn",
        "model.layers.0.linear_attn",
        "model.layers.1.self_attn",
        "model.layers.2.linear_attn",
    ]


def test_bug_16_depth_comes_from_the_text_config() -> None:
    model = family("gemma3_vlm")
    assert not hasattr(model.config, "num_hidden_layers")
    assert find_decoder(model).num_layers == BLOCKS
    assert find_decoder(model).hidden_size == HIDDEN


def test_bug_17_a_renamed_folder_changes_nothing(tmp_path: Any) -> None:
    folder = tmp_path / "gpt2-opt-bloom-falcon"
    family("gemma2").save_pretrained(folder)
    renamed = tf.AutoModelForCausalLM.from_pretrained(folder)
    sites = [Site(1, kind) for kind in GEMMA]
    assert describe(locate(renamed, sites), "model.layers") == GEMMA


def test_bug_18_no_site_is_skipped_in_silence() -> None:
    for name in ("mixtral", "qwen3_moe", "gpt_oss"):
        with pytest.raises(SiteError, match=r"mlp_post\.2: `mlp` routes tokens to `mlp\.experts`"):
            locate(family(name), [Site(2), Site(1, "z"), Site(2, "mlp_post")])
    asked = [Site(layer, kind) for layer in range(BLOCKS) for kind in ("resid_pre", *LLAMA)]
    assert list(locate(family("llama"), asked)) == asked


Pair = namedtuple("Pair", ["hidden", "rest"])


@pytest.mark.parametrize("wrap", ["tensor", "tuple", "list", "namedtuple", "ModelOutput", "dict"])
def test_bug_35_outputs_of_every_type_are_read_and_written(wrap: str) -> None:
    tensor, rest, value = torch.zeros(1, 2, 3), torch.ones(2), torch.full((1, 2, 3), 5.0)
    outputs: dict[str, Any] = {
        "tensor": tensor,
        "tuple": (tensor, rest, None),
        "list": [tensor, rest],
        "namedtuple": Pair(tensor, rest),
        "ModelOutput": BaseModelOutputWithPast(last_hidden_state=tensor, hidden_states=(rest,)),
        "dict": {"hidden": tensor, "rest": rest},
    }
    output = outputs[wrap]
    tap = Tap(Site(0), nn.Identity(), "block", "output", flat=False, width=3)
    assert tap.read((), {}, output) is tensor
    written = tap.write_output(output, value)
    assert type(written) is type(output)
    assert tap.read((), {}, written) is value
    assert tap.read((), {}, output) is tensor, "what was given is left alone"
    assert tensor.eq(0).all()
    if wrap != "tensor":
        assert len(written) == len(output)
        kept = (
            written.hidden_states[0]
            if wrap == "ModelOutput"
            else list(getattr(written, "values", lambda: written)())[1]
        )
        assert kept is rest


def test_bug_35_arguments_are_read_and_written_by_place_or_by_name() -> None:
    tap = Tap(Site(0, "resid_pre"), nn.Identity(), "block", "input", flat=False, width=3)
    tensor, value = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert tap.read((tensor, "mask"), {"use_cache": True}) is tensor
    assert tap.write_input((tensor, "mask"), {"use_cache": True}, value) == ((value, "mask"), {"use_cache": True})
    kwargs = {"hidden_states": tensor, "mask": None}
    assert tap.read((), kwargs) is tensor
    assert tap.write_input((), kwargs, value) == ((), {"hidden_states": value, "mask": None})
    assert kwargs["hidden_states"] is tensor
    with pytest.raises(SiteError, match=r"resid_pre\.0: the input of block is NoneType, not a tensor"):
        tap.read((), {"x": tensor})


# ---------------------------------------------------------------------------------------------------------------------
# Wrappers


def test_adapters_are_seen_as_the_layers_they_wrap() -> None:
    wrapped = family("llama_peft")
    taps = locate(wrapped, [Site(2, "z"), Site(2, "mlp_post")])
    assert type(wrapped).__name__ == "PeftModelForCausalLM"
    assert type(inner_model(wrapped)).__name__ == "LlamaForCausalLM"
    for tap in taps.values():
        assert hasattr(tap.module, "base_layer"), "the wrapper, so that the adapter reads the edit too"


def test_wrappers_are_looked_through() -> None:
    model = family("llama")
    compiled: Any = torch.compile(model, backend="eager")
    assert inner_model(compiled) is model
    assert inner_model(nn.DataParallel(compiled)) is model
    assert inner_model(model) is model
    assert find_decoder(nn.DataParallel(compiled)).model is model
    assert inner_model(family("llama_peft")) is family("llama_peft").get_base_model()


def test_a_distributed_model_is_looked_through(tmp_path: Any) -> None:
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = build("llama")
        assert inner_model(nn.parallel.DistributedDataParallel(model)) is model
    finally:
        distributed.destroy_process_group()


def test_a_compiled_model_is_probed_eagerly() -> None:
    model = build("gpt2")
    model.compile(backend="eager")
    for block in find_decoder(model).blocks:
        block.compile(backend="eager")
    plain = run(model).logits
    taps = locate(model, [Site(1, kind) for kind in TABLE["gpt2", 1]])
    assert describe(taps, "transformer.h") == TABLE["gpt2", 1]
    assert torch.equal(run(model).logits, plain)


def test_a_block_inside_a_wrapper_is_found() -> None:
    model: Any = build("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    taps = locate(model, [Site(1, kind) for kind in LLAMA])
    assert describe(taps, "model.layers") == {
        kind: name.replace("I ", "I _orig_mod.") if name.startswith("I ") else f"_orig_mod.{name}"
        for kind, name in LLAMA.items()
    }


@pytest.mark.parametrize("name", ["llama", "falcon", "opt", "mixtral"])
def test_offloaded_weights_are_no_hindrance(name: str, tmp_path: Any) -> None:
    from accelerate import cpu_offload, dispatch_model

    expected = TABLE[name, 1]
    sites = [Site(1, kind) for kind in expected]
    prefix = PREFIX.get(name, "model.layers")
    model = cpu_offload(build(name), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert describe(locate(model, sites), prefix) == expected

    model = build(name)
    plain = run(model).logits
    # A tied head must stay with its embedding; the blocks go to the disk.
    places = {child: "cpu" for child, _ in model.named_children()}
    body = prefix.removesuffix(".layers").removesuffix(".h")
    places.pop(body.split(".")[0])
    places |= {f"{body}.{child}": "cpu" for child, _ in model.get_submodule(body).named_children()}
    places.pop(prefix)
    places |= {f"{prefix}.{layer}": "disk" if layer % 2 else "cpu" for layer in range(BLOCKS)}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert describe(locate(model, sites), prefix) == expected
    assert torch.equal(run(model).logits, plain)


def test_an_outer_pass_clock_is_suspended() -> None:
    model = build("llama")

    class Clock:
        depth = 0
        during: list[int]

        def __call__(self, _module: Any, _args: Any) -> None: ...

        @contextlib.contextmanager
        def suspended(self) -> Any:
            self.depth += 1
            yield
            self.depth -= 1

    clock = Clock()
    seen = []
    model.register_forward_pre_hook(clock)
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(clock.depth))
    locate(model, [Site(1, "attn_out")])
    assert set(seen) == {1}
    assert clock.depth == 0


def test_edits_of_others_do_not_hide_the_structure() -> None:
    model: Any = build("gemma2")
    block = model.model.layers[1]
    block.register_forward_pre_hook(lambda _m, args: (args[0] * 2, *args[1:]))
    block.self_attn.register_forward_hook(lambda _m, _a, output: (output[0] + 3, *output[1:]))
    block.mlp.down_proj.register_forward_pre_hook(lambda _m, args: (args[0] * 2, *args[1:]))
    block.post_attention_layernorm.register_forward_hook(lambda _m, _a, output: output - 1, prepend=True)
    block.register_forward_hook(lambda _m, _a, output: output + 7, prepend=True)
    assert describe(locate(model, [Site(1, kind) for kind in GEMMA]), "model.layers") == GEMMA


# ---------------------------------------------------------------------------------------------------------------------
# Looking changes nothing


def test_the_model_is_left_as_it_was() -> None:
    model = build("gpt_neox")
    model.config.output_hidden_states = True  # the first pass with it would install hooks that stay
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    flags = [module.training for module in model.modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()

    locate(model, [Site(layer, kind) for layer in (1, 3) for kind in TABLE["gpt_neox", 1]])
    with pytest.raises(SiteError):
        locate(model, [Site(1, "mixer_out")])

    assert hook_count(model) == 0
    assert [module.training for module in model.modules()] == flags
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_a_failing_probe_is_reported_and_leaves_nothing() -> None:
    model: Any = build("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    before = hook_count(model)
    with pytest.raises(SiteError, match=r"LlamaModel does not run on 3 plain tokens.*ZeroDivisionError"):
        locate(model, [Site(2, "attn_out")])
    assert hook_count(model) == before


def test_blocks_after_the_deepest_do_not_run_and_the_stream_needs_one_pass_in_a_model_s_life() -> None:
    model: Any = build("llama")
    ran = []
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    locate(model, [Site(3)])
    assert ran == [0, 1, 2, 3]
    ran.clear()
    locate(model, [Site(1, "z"), Site(3)])
    assert ran == [0], "the deepest block asked ends the pass before later hooks run on it"
    ran.clear()
    locate(model, [Site(3), Site(2, "resid_pre")])
    assert ran == []


# ---------------------------------------------------------------------------------------------------------------------
# Models that are no decoders


def _tiny(config: type, model: type, **sizes: Any) -> Any:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return model(config(**({"vocab_size": 64, **shape} | sizes)))


def test_encoders_and_encoder_decoders_are_refused() -> None:
    bert = _tiny(tf.BertConfig, tf.BertModel)
    with pytest.raises(SiteError, match="BertModel is an encoder, or sees its whole prompt: it is not causal"):
        find_decoder(bert)
    with pytest.raises(SiteError, match="BertForMaskedLM is an encoder"):
        find_decoder(_tiny(tf.BertConfig, tf.BertForMaskedLM))
    with pytest.raises(SiteError, match="DebertaV2ForMaskedLM is an encoder"):
        find_decoder(_tiny(tf.DebertaV2Config, tf.DebertaV2ForMaskedLM))
    with pytest.raises(SiteError, match="BigBirdForCausalLM is an encoder"):
        find_decoder(_tiny(tf.BigBirdConfig, tf.BigBirdForCausalLM, attention_type="original_full"))
    decoding = _tiny(tf.BertConfig, tf.BertLMHeadModel, is_decoder=True)
    assert find_decoder(decoding).num_layers == 2

    t5 = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(SiteError, match="T5ForConditionalGeneration is an encoder-decoder"):
        find_decoder(t5)


def test_a_bare_body_and_a_classifier_are_decoders() -> None:
    model = family("llama")
    assert find_decoder(model.model).path == "layers"
    classifier = tf.LlamaForSequenceClassification(tf.LlamaConfig(**GROUPED, **QUIET))
    assert find_decoder(classifier).num_layers == BLOCKS


def test_anything_else_is_refused() -> None:
    with pytest.raises(SiteError, match=r"Linear has no get_decoder\(\); pass a causal language model"):
        find_decoder(nn.Linear(2, 2))
    with torch.device("meta"):
        empty = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, **QUIET))
    with pytest.raises(SiteError, match="LlamaForCausalLM has no weights: all parameters are on the meta device"):
        find_decoder(empty)


def test_block_lists_that_do_not_fit_are_listed() -> None:
    model: Any = build("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(SiteError, match=r"LlamaForCausalLM says 5 blocks, but its module lists are: layers \(4\)"):
        find_decoder(model)
    model.config.num_hidden_layers = 4
    model.model.draft = nn.ModuleList(nn.Identity() for _ in range(4))
    with pytest.raises(
        SiteError, match=r"LlamaForCausalLM has 2 lists of 4 modules: layers, draft; which are blocks\?"
    ):
        find_decoder(model)
    del model.model.draft
    model.model.layers[0].experts = nn.ModuleList(nn.Identity() for _ in range(4))  # as many experts as blocks
    assert find_decoder(model).path == "model.layers"
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(SiteError, match="LlamaForCausalLM uses one block for several layers of layers"):
        find_decoder(model)


def test_stacks_that_the_config_does_not_count_are_refused() -> None:
    """BLT reads bytes in one stack, patches of several bytes in another, and writes bytes in a third."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bytewise = {**sizes, "num_key_value_heads": 2, "vocab_size": VOCAB, "hidden_size_global": 64}
    whole = {**sizes, "num_key_value_heads": 2, "hidden_size": 64}
    parts = {"patcher_config": bytewise, "encoder_config": bytewise, "decoder_config": bytewise, "global_config": whole}
    model = tf.BltForCausalLM(tf.BltConfig(vocab_size=VOCAB, encoder_hash_byte_group_vocab=64, **parts)).eval()
    tokenizer = byte_tokenizer()
    ids = torch.tensor([[5, 17, 44, 9]])
    with torch.no_grad():
        assert model(input_ids=ids, use_cache=False).logits.shape == (1, 4, VOCAB), "it runs by itself"
    data = steerkit.ContrastSet.from_prompts(["good"], ["bad"])
    vector = vector_for(family("llama"), scope="all")
    for attempt in (
        lambda: find_decoder(model),
        lambda: steerkit.fit(model, tokenizer, data, layers=[1]),
        lambda: steerkit.record(model, tokenizer, data, ["resid_post.1"]),
        lambda: steerkit.steer(model, vector),
        lambda: steerkit.edited(model, vector).__enter__(),
    ):
        with pytest.raises(SiteError, match="BltForCausalLM has no number of blocks, and its module lists are: "):
            attempt()


def test_sites_in_little_room() -> None:
    listed = [f"{kind}.{layer}" for layer in (15, 17, 18, 19, 20, 22, 23) for kind in ("attn_in", "mlp_in")]
    assert sites_text(listed) == "attn_in, mlp_in 15+17-20+22+23"
    assert sites_text(["resid_post.3", "z.1", "resid_post.1"]) == "resid_post 1+3; z 1"
    assert layers_text([]) == ""
