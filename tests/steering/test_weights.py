"""`edited`: the exact weight form equals the hooks, and the weights come back bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch

import steerkit
from steerkit.errors import ModelError, ScopeError, SiteError, StrengthError, VectorFileError
from steerkit.network.sites import Site
from steerkit.steering.weights import exact_updates
from tests import modes, tolerances
from tests.families import build
from tests.gated import gated_vector

PLACES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "falcon",
    "bloom",
    "cohere",
    "llama_peft",
    "gpt_oss",
    "mamba",
)
NO_PLACE = {
    "gemma2": "norms what `mlp` gives",
    "olmo2": "norms what `mlp` gives",
    "opt_post": "norms stand on the residual stream",
    "mixtral": "experts, which have no bias",
    "qwen3_moe": "experts, which have no bias",
    "qwen3_next": "experts, which have no bias",
}


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", PLACES)
def test_weights_equal_hooks_and_come_back(family: str) -> None:
    model = build(family)
    vector = modes.vector_for(model, scope="all", site=Site(2, "resid_post"))
    before = state_of(model)
    baseline = modes.plain_logits(model, modes.LONG)
    with steerkit.steer(model, vector, 0.7):
        hooked = modes.plain_logits(model, modes.LONG)
    with steerkit.edited(model, vector, 0.7):
        folded = modes.plain_logits(model, modes.LONG)
    assert float((folded - hooked).abs().max() / hooked.abs().max()) < tolerances.of_family(family)
    assert not torch.allclose(folded, baseline)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(modes.plain_logits(model, modes.LONG), baseline)


@pytest.mark.parametrize("family", NO_PLACE)
def test_families_without_a_place_are_refused(family: str) -> None:
    model = build(family)
    vector = modes.vector_for(model, scope="all")
    before = state_of(model)
    with pytest.raises(SiteError, match=NO_PLACE[family]), steerkit.edited(model, vector):
        pass
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_an_error_inside_puts_the_weights_back() -> None:
    model = build("gpt2")
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), steerkit.edited(model, modes.vector_for(model, scope="all")):
        raise ZeroDivisionError
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_an_error_at_the_second_weight_puts_the_first_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from steerkit.steering import weights

    model = build("gpt2")
    one = modes.vector_for(model, scope="all", site=Site(1, "resid_post"))
    other = modes.vector_for(model, scope="all", site=Site(2, "resid_post"))
    both = dataclasses.replace(one, sites=(*one.sites, *other.sites), tensors={**one.tensors, **other.tensors})
    real, calls = weights._write, []

    def write(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no more memory")
        return real(*args)

    monkeypatch.setattr(weights, "_write", write)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="no more memory"), steerkit.edited(model, both):
        pass
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not model._forward_pre_hooks


def test_ctrl_c_just_behind_a_write_puts_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal's exception comes as soon as the copy returns."""
    model = build("gpt2")
    vector = modes.vector_for(model, scope="all")
    before, real = state_of(model), torch.Tensor.copy_

    def copy_(self: Any, *args: Any) -> Any:
        written = real(self, *args)
        if isinstance(self, torch.nn.Parameter):
            monkeypatch.undo()
            raise KeyboardInterrupt
        return written

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    with pytest.raises(KeyboardInterrupt), steerkit.edited(model, vector):
        pytest.fail("not interrupted")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not model._forward_pre_hooks


def test_one_weight_that_cannot_be_put_back_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from steerkit.steering import weights

    model = build("gpt2")
    parts = [modes.vector_for(model, scope="all", site=Site(layer, "resid_post")) for layer in (1, 2)]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    both = dataclasses.replace(parts[0], sites=tuple(part.sites[0] for part in parts), tensors=tensors)
    before, real, calls = state_of(model), weights._put_back, []

    def put_back(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("lost device")
        real(*args)

    monkeypatch.setattr(weights, "_put_back", put_back)
    with pytest.raises(RuntimeError, match="lost device"), steerkit.edited(model, both):
        pass
    changed = [name for name, value in before.items() if not torch.equal(model.state_dict()[name], value)]
    assert changed == ["transformer.h.2.mlp.c_proj.bias"], "the last written is put back first"
    assert not model._forward_pre_hooks


def test_one_vector_at_a_time() -> None:
    model = build("gpt2")
    vector = modes.vector_for(model, scope="all")
    with pytest.raises(VectorFileError, match="got 2 vectors"), steerkit.edited(model, [vector, vector]):  # type: ignore[arg-type]
        pass
    with steerkit.edited(model, [vector]):  # type: ignore[arg-type]
        pass


def test_a_gate_is_no_weight_whatever_its_scope() -> None:
    model = build("llama")
    for scope in ("response", "all"):
        with pytest.raises(StrengthError, match="conditional has no exact weight form"):
            exact_updates(model, gated_vector(model, scope=scope))


def test_applying_twice_is_refused() -> None:
    model = build("llama")
    vector = modes.vector_for(model, scope="all")
    with steerkit.edited(model, vector):
        with pytest.raises(ModelError, match="edited already"), steerkit.edited(model, vector):
            pass
        twin = copy.deepcopy(model)
    with steerkit.edited(twin, vector):
        pass
    with steerkit.edited(model, vector):
        pass


def test_a_model_saved_inside_is_not_taken_for_edited() -> None:
    model = build("gpt2")
    vector = modes.vector_for(model, scope="all")
    with steerkit.edited(model, vector):
        store = io.BytesIO()
        torch.save(model, store)
    store.seek(0)
    loaded = torch.load(store, weights_only=False)
    with steerkit.edited(loaded, vector):
        pass


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"scope": "response"}, ScopeError, "scope='all'"),
        ({"strength": [1.0, 2.0]}, StrengthError, "one finite number"),
    ],
)
def test_what_weights_cannot_do_is_refused(change: dict[str, Any], error: type[Exception], match: str) -> None:
    model = build("llama")
    vector = modes.vector_for(model, scope="all").at(**change)
    with pytest.raises(error, match=match), steerkit.edited(model, vector):
        pass


def test_only_additions_at_the_block_s_output_have_a_weight_form() -> None:
    model = build("llama")
    vector = modes.vector_for(model, scope="all", site=Site(1, "attn_out"))
    with pytest.raises(SiteError, match="resid_post"), steerkit.edited(model, vector):
        pass
    window = modes.vector_for(model, scope="front", site=Site(1, "resid_pre"))
    with pytest.raises(StrengthError, match="no exact weight form"), steerkit.edited(model, window):
        pass


def test_offloaded_weights_are_refused() -> None:
    from accelerate import cpu_offload

    model = build("llama")
    vector = modes.vector_for(model, scope="all")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match="offloaded"), steerkit.edited(model, vector):
        pass
