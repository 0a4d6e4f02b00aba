"""What is exported to llama.cpp, loaded by llama.cpp: its logits are those of the hooks, and those of no other place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit
from steerkit.export.gguf import write_control_vector
from steerkit.vector.steering_vector import SteeringVector
from tests.families import BLOCKS, HIDDEN, build
from tests.llama_cpp import Engine, as_gguf_model, kl

IDS = torch.tensor([5, 17, 44, 9, 101, 63, 80, 12])
EXACT, DIFFERENT = 1e-5, 1e-2


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
