"""A hooked module that is replaced inside a context would go unsteered without a word: the next pass refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steerkit
from steerkit.checks._bitwise import hooks_of
from steerkit.errors import ModelError, SiteError
from steerkit.monitor import Monitor
from steerkit.network.decoder import inner_model
from steerkit.network.placement import Placement
from steerkit.network.sites import KINDS, Site
from steerkit.network.tap import locate
from steerkit.vector.steering_vector import SteeringVector
from tests.families import BLOCKS, HIDDEN, VOCAB, build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

IDS = torch.arange(2 * 8).mul(7919).remainder(VOCAB).reshape(2, 8)


def vector_at(site: str, width: int = HIDDEN) -> SteeringVector:
    return SteeringVector(
        suggested_strength=1.0,
        method="caa",
        tensors={f"{site}/direction": torch.linspace(-1, 1, width)},
        sites=(Site.parse(site),),
        edit="add",
        scope="all",
        unit="paper",
        model_type="llama",
        hidden_size=HIDDEN,
        num_layers=BLOCKS,
        widths={Site.parse(site): width} if width != HIDDEN else {},
    )


def hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize(
    ("site", "place"),
    [
        ("mlp_post.1", "model.layers.1.mlp.down_proj"),
        ("mlp_out.1", "model.layers.1.mlp"),
        ("resid_post.1", "model.layers.1"),
        ("mlp_out.1", "model.layers"),
    ],
)
def test_a_module_that_is_replaced_is_noticed_at_the_next_pass(site: str, place: str) -> None:
    model, other = (build("llama") for _ in range(2))
    plain, before = logits(model), hooks_of(model)
    vector = vector_at(site, width=48 if site.startswith("mlp_post") else HIDDEN)
    steering = steerkit.steer(model, vector)
    with steering:
        assert not torch.equal(logits(model), plain)
        model.set_submodule(place, other.get_submodule(place))
        with pytest.raises(ModelError, match=r"^model\.layers.* is another module now .*before the context"):
            logits(model)
        with pytest.raises(ModelError, match="another module"):
            model.generate(input_ids=IDS, max_new_tokens=2)  # type: ignore[operator]
    assert hooks_of(model) == before
    assert torch.equal(logits(model), plain)
    with pytest.raises(ModelError, match="another module"), steering:  # planned for a module that is gone
        pass
    assert hooks_of(model) == before
    with steerkit.steer(model, vector):
        assert not torch.equal(logits(model), plain)


@pytest.mark.parametrize("leave", ["merge_and_unload", "unload"])
def test_an_adapter_that_leaves_inside_the_context_is_noticed(leave: str) -> None:
    model: Any = build("llama_peft")
    bare = model.get_base_model()
    vector = vector_at("mlp_post.1", width=48)
    with steerkit.steer(model, vector):
        getattr(model, leave)()
        with pytest.raises(ModelError, match=r"down_proj is another module now \(Linear\)"):
            logits(bare)
    assert torch.equal(logits(bare), logits(bare))
    assert not any(type(hook).__module__.startswith("steerkit") for module in bare.modules() for hook in hooks(module))


def test_an_adapter_that_leaves_where_nothing_is_hooked_is_no_matter() -> None:
    model: Any = build("llama_peft")
    with steerkit.steer(model, vector_at("resid_post.1")):
        bare = model.merge_and_unload()
        steered = logits(bare)
    assert not torch.equal(steered, logits(bare))


def test_watching_notices_it_too() -> None:
    model, other = (build("llama") for _ in range(2))
    monitor = Monitor(model, byte_tokenizer(CHATML), vector_at("mlp_out.1"), calibrated=False)
    with monitor.watch():
        model.set_submodule("model.layers.1.mlp", other.get_submodule("model.layers.1.mlp"))
        with pytest.raises(ModelError, match="another module"):
            model.generate(input_ids=IDS, max_new_tokens=2)  # type: ignore[operator]


def test_a_compiled_block_is_the_same_block() -> None:
    model: Any = build("llama")
    placement = Placement(model, locate(model, [Site(1), Site(1, "mlp_out")]).values())
    model.model.layers[1] = torch.compile(model.model.layers[1])
    placement.check()


@pytest.mark.parametrize("family", ["gpt2", "opt", "mixtral", "mamba", "llama_peft"])
def test_every_site_stands_where_its_name_says(family: str) -> None:
    model = build(family)
    taps = []
    for kind in KINDS:
        try:
            taps += locate(model, [Site(layer, kind) for layer in range(BLOCKS)]).values()
        except SiteError:
            continue
    assert len(taps) >= 2 * BLOCKS
    Placement(inner_model(model), taps).check()
