"""What is exported to llama.cpp, loaded there: its logits are those of the hooks, and of no other place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit
from steerkit.export.adapter_parts import parts_for
from steerkit.export.gguf import write_control_vector
from steerkit.export.gguf_lora import FAMILIES, write_gguf_lora, write_parts
from steerkit.export.weight_changes import changes_of
from steerkit.methods._protocols import WeightUpdate
from steerkit.vector.steering_vector import SteeringVector
from tests.families import BLOCKS, HIDDEN, build
from tests.llama_cpp import Engine, as_gguf_model, kl, library
from tests.methods import test_ablation

IDS = torch.tensor([5, 17, 44, 9, 101, 63, 80, 12])
EXACT, DIFFERENT = 1e-5, 1e-2


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    """Nothing is written for an engine that is not installed."""
    library()


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Engine]:
    """A tiny model in transformers and in llama.cpp."""
    model = build(request.param)
    path = as_gguf_model(model, tmp_path_factory.mktemp("gguf") / "model.gguf", request.param)
    return model, Engine(path)


def hooked(model: Any, vector: SteeringVector | None = None, strength: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        if vector is None:
            return model(IDS[None]).logits[0]
        with steerkit.steer(model, vector, strength):
            return model(IDS[None]).logits[0]


def test_the_models_are_the_same(both: tuple[Any, Engine]) -> None:
    model, engine = both
    assert kl(hooked(model), engine.logits(IDS)) < EXACT


@pytest.mark.parametrize("layers", [[1], [2], [3], [1, 2]])
def test_a_control_vector_acts_where_the_hooks_do(both: tuple[Any, Engine], layers: list[int], tmp_path: Path) -> None:
    model, engine = both
    rows = torch.randn(BLOCKS, HIDDEN, generator=torch.Generator().manual_seed(1))
    vector = SteeringVector.from_directions({layer: rows[layer] for layer in layers}, model, scope="all")
    path = write_control_vector(vector, tmp_path / "v.gguf", strength=1.5)
    expected = hooked(model, vector, 1.5)
    assert kl(expected, engine.logits(IDS, vector=path)) < EXACT
    assert kl(expected, engine.logits(IDS)) > DIFFERENT
    for shift in (-1, 1):
        if all(1 <= layer + shift < BLOCKS for layer in layers):
            assert kl(expected, engine.logits(IDS, vector=path, shift=shift)) > DIFFERENT


def written(model: Any, **settings: Any) -> SteeringVector:
    return test_ablation.vector_for(model, **settings).at(scope="all")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_an_adapter_does_what_the_hooks_do(family: str, tmp_path: Path) -> None:
    model = build(family)
    engine = Engine(as_gguf_model(model, tmp_path / "model.gguf", "llama" if family == "mistral" else family))
    assert kl(hooked(model), engine.logits(IDS)) < EXACT
    vector = written(model, writes="every")
    lora = write_gguf_lora(model, None, vector, tmp_path / "lora.gguf", strength=1.0)
    assert "token_embd.weight" in lora.tensors and "blk.3.ffn_down.weight" in lora.tensors
    expected = hooked(model, vector, 1.0)
    assert kl(expected, engine.logits(IDS, lora=lora.file)) < EXACT
    assert kl(expected, engine.logits(IDS)) > DIFFERENT


def test_a_share_at_chosen_outputs(tmp_path: Path) -> None:
    model = build("llama")
    engine = Engine(as_gguf_model(model, tmp_path / "model.gguf", "llama"))
    vector = written(model, writes=("attn_out.1", "mlp_out.2"))
    lora = write_gguf_lora(model, None, vector, tmp_path / "lora.gguf", strength=0.6)
    assert lora.tensors == ("blk.1.attn_output.weight", "blk.2.ffn_down.weight")
    assert kl(hooked(model, vector, 0.6), engine.logits(IDS, lora=lora.file)) < EXACT


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_matrix_has_its_name_and_the_order_of_its_rows(family: str, tmp_path: Path) -> None:
    """A random change of rank 2 of every matrix of the blocks, queries and keys among them."""
    model = build(family)
    engine = Engine(as_gguf_model(model, tmp_path / "model.gguf", "llama" if family == "mistral" else family))
    draw = torch.Generator().manual_seed(4)
    changed = build(family)
    updates = []
    for name, weight in changed.named_parameters():
        if weight.dim() == 2 and ".layers." in name:
            left, right = torch.randn(len(weight), 2, generator=draw), torch.randn(2, weight.shape[1], generator=draw)
            step = 0.02 * left @ right
            updates.append(WeightUpdate(name, lambda old, step=step: old + step))
            weight.data += step
    parts = parts_for(model, changes_of(updates))
    names = write_parts(model, parts, FAMILIES[family], tmp_path / "lora.gguf")
    assert (parts.rank, len(names)) == (2, 7 * BLOCKS)
    expected = hooked(changed)
    assert kl(expected, engine.logits(IDS, lora=tmp_path / "lora.gguf")) < EXACT
    assert kl(expected, engine.logits(IDS)) > DIFFERENT


@pytest.mark.slow
@pytest.mark.embedded
def test_the_embedded_model_in_full_precision(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    """Real weights, 30 blocks, the shipped vector and a prompt of words."""
    model, tokenizer = embedded
    engine = Engine(as_gguf_model(model, tmp_path / "model.gguf", "llama"))
    (tmp_path / "model.gguf").unlink()  # half a gigabyte, which stays open
    ids = tokenizer("The weather today is a thing that people talk about", return_tensors="pt").input_ids[0]
    vector = SteeringVector.load("optimism-caa").at(scope="all")
    path = write_control_vector(vector, tmp_path / "v.gguf")
    with torch.no_grad():
        plain = model(ids[None]).logits[0]
        with steerkit.steer(model, vector):
            steered = model(ids[None]).logits[0]
    assert kl(plain, engine.logits(ids)) < EXACT
    assert kl(steered, engine.logits(ids, vector=path)) < EXACT
    for shift in (-1, 1):
        assert kl(steered, engine.logits(ids, vector=path, shift=shift)) > 1e-3
