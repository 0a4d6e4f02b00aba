"""Quantised models are read and steered like any other; what changes weights is exact, or refuses beforehand."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.activations.recording import record_ids
from steerkit.checks.doctor.checks import doctor
from steerkit.checks.planning import plan
from steerkit.errors import ModelError, SiteError, SteerError
from steerkit.export import bake, write_adapter
from steerkit.methods import _registry as registry
from steerkit.model import describe, weights_of
from steerkit.monitor import Monitor
from steerkit.network.decoder import inner_model
from steerkit.network.plain_weights import hidden_weight
from tests.families import FAMILIES, VOCAB, build
from tests.methods.test_every_method import data_for
from tests.quantised import BY_CONFIG, KINDS, llama, quantised
from tests.tiny_tokenizers import CHATML, byte_tokenizer
from tests.tolerances import gap, tolerance

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

IDS = torch.arange(2 * 12).mul(7919).remainder(VOCAB).reshape(2, 12)
TOKENIZER = byte_tokenizer(CHATML)
METHODS = {"caa": {}, "ablation": {"writes": "every"}, "selective": {}, "austeer": {}, "steer2edit": {}}
COVERING = [("bnb4", "steer2edit"), ("bnb8", "selective"), ("torchao", "steer2edit"), ("quanto", "austeer")]
COVERING += [("quanto_unfrozen", "steer2edit"), ("dynamic", "ablation"), ("torchao_config", "ablation")]
COVERING += [("bnb4_config", "ablation"), ("bnb8_config", "steer2edit"), ("quanto_config", "selective")]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def fitted(model: Any, name: str) -> Any:
    method = registry.resolve(name)(**METHODS[name])
    return steerkit.fit(model, TOKENIZER, data_for(method), method=method).at(scope="all")


@pytest.mark.parametrize("kind", KINDS)
def test_an_addition_goes_where_a_hand_written_hook_puts_it(kind: str, tmp_path: Path) -> None:
    model = quantised(kind, tmp_path)
    plain = logits(model)
    vector = fitted(model, "caa")
    (site,) = vector.sites
    direction = vector.params(site)["direction"]
    (acts,) = record_ids(model, IDS[:1].tolist(), [site])[site]
    with torch.no_grad():
        hidden = model(input_ids=IDS[:1], use_cache=False, output_hidden_states=True).hidden_states
    assert torch.equal(acts, hidden[site.layer + 1][0])
    with steerkit.steer(model, vector, 2.0):
        steered = logits(model)
    handle = model.model.layers[site.layer].register_forward_hook(lambda _module, _args, out: out + 2.0 * direction)
    by_hand = logits(model)
    handle.remove()
    assert torch.equal(steered, by_hand)
    assert not torch.allclose(steered, plain, atol=1e-2)
    scores = Monitor(model, TOKENIZER, vector, calibrated=False).score(["a fine day", "no"])
    assert bool(torch.isfinite(scores).all())
    assert plan(model, vector, measure=False).edits
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_have_a_digest(kind: str, tmp_path: Path) -> None:
    """The same for the same weights, made twice; another where the parameters are no longer the plain ones."""
    packed = weights_of(quantised(kind, tmp_path / "1"))
    assert packed.digest == weights_of(quantised(kind, tmp_path / "2")).digest
    assert (packed.digest == weights_of(llama()).digest) == (kind == "quanto_unfrozen")


def changes(model: Any, vector: Any, folder: Path) -> dict[str, str | float]:
    """What each way to write weights makes of a model: how far it is from the hooks, or which error refused it."""
    plain = logits(model)
    with steerkit.steer(model, vector, 1.0):
        hooked = logits(model)
    found: dict[str, str | float] = {}

    def edit() -> float:
        with steerkit.edited(model, vector, 1.0):
            return gap(logits(model), hooked)

    ways: dict[str, Any] = {
        "edited": edit,
        "adapter": lambda: write_adapter(model, TOKENIZER, vector, folder / "a", strength=1.0).verification.holds,
        "bake": lambda: bake(model, TOKENIZER, vector, folder / "b", strength=1.0).verification.holds,
    }
    for name, way in ways.items():
        try:
            found[name] = way()
        except SteerError as error:
            assert "\n" not in str(error)
            found[name] = type(error).__name__
        assert torch.equal(logits(model), plain), name
    return found


def check_changes(kind: str, name: str, folder: Path) -> dict[str, str | float]:
    model = quantised(kind, folder)
    try:
        vector = fitted(model, name)
    except SiteError:  # there is no such place in this model
        return {}
    except ModelError as error:  # the weights it is tied to cannot be seen
        assert kind == "dynamic", error
        return {}
    found = changes(model, vector, folder)
    assert isinstance(found["edited"], str) or found["edited"] <= tolerance(model, IDS), found
    assert found["bake"] == "ModelError"
    return found


@pytest.mark.parametrize(("kind", "name"), COVERING)
def test_weights_are_changed_exactly_or_not_at_all(kind: str, name: str, tmp_path: Path) -> None:
    found = check_changes(kind, name, tmp_path)
    if found:
        assert found["edited"] == "ModelError", found
    if kind in ("torchao", "quanto", "quanto_unfrozen", *(one for one in BY_CONFIG if one != "torchao_config")):
        assert found["adapter"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_changes_every_kind_exactly_or_not_at_all(kind: str, name: str, tmp_path: Path) -> None:
    check_changes(kind, name, tmp_path)


@pytest.mark.parametrize("kind", ["bnb4", "quanto", "quanto_unfrozen"])
def test_an_addition_becomes_an_adapter(kind: str, tmp_path: Path) -> None:
    model = quantised(kind, tmp_path)
    plain = logits(model)
    assert write_adapter(model, TOKENIZER, fitted(model, "caa"), tmp_path / "out", strength=2.0).verification.holds
    assert torch.equal(logits(model), plain)


def test_peft_has_no_bias_for_torchao(tmp_path: Path) -> None:
    model = quantised("torchao", tmp_path)
    with pytest.raises(SiteError, match="peft refuses this adapter"):
        write_adapter(model, TOKENIZER, fitted(model, "caa"), tmp_path / "out", strength=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_doctor_passes_or_says_why(kind: str, tmp_path: Path) -> None:
    for finding in doctor(quantised(kind, tmp_path), TOKENIZER):
        assert finding.passed or "the model itself" in finding.reason, finding


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weights_of_ordinary_models_are_plain(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert hidden_weight(inner_model(build(family)).to(dtype)) is None


# --- by load_model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary model as a folder."""
    folder = tmp_path_factory.mktemp("plain") / "llama"
    llama().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("asked", "told"), [("4bit", "4 bit"), ("8bit", "8 bit")])
def test_a_model_is_quantised_while_it_is_loaded(asked: Any, told: str, plain: Path) -> None:
    pytest.importorskip("bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model, _ = steerkit.load_model(plain, device="cpu", dtype="bfloat16", quantize=asked)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert type(layer).__name__ == {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[asked]
    assert getattr(layer, "compute_dtype", torch.bfloat16) is torch.bfloat16
    assert describe(model) == f"on cpu, bfloat16, {told}"
    assert hidden_weight(inner_model(model)) is not None
    vector = fitted(model, "caa")
    before = logits(model)
    with steerkit.steer(model, vector, 2.0):
        assert not torch.equal(logits(model), before)


def test_what_is_quantised_already_is_refused(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "packed")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="packed: is quantised already; leave quantize out") as caught:
        steerkit.load_model(tmp_path / "packed", device="cpu", quantize="4bit")
    assert "\n" not in str(caught.value)


def test_a_missing_quantiser_names_its_extra(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ModelError, match=r"quantize '4bit' needs bitsandbytes; pip install 'steerkit-hf\[quantised\]'"):
        steerkit.load_model(plain, quantize="4bit")
