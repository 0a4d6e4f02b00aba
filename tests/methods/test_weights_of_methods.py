"""Vectors that edit single components, as checkpoints and as adapters: what both write is what the hooks do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import steerkit
from steerkit.export.baking import bake
from steerkit.export.peft import write_adapter
from steerkit.vector.steering_vector import SteeringVector
from tests.families import build
from tests.methods import test_ablation, test_steer2edit
from tests.pairwise import pairwise
from tests.tiny_tokenizers import CHATML, byte_tokenizer

WAYS = {"bake": bake, "peft": write_adapter}


def edit(family: str) -> tuple[Any, SteeringVector]:
    model, vector = test_steer2edit.fitted(family)
    return model, vector.at(scope="all")


def units(family: str) -> tuple[Any, SteeringVector]:
    model = build(family)
    vector = steerkit.fit(model, byte_tokenizer(CHATML), test_ablation.data(), method="austeer")
    return model, vector.at(scope="all")


CELLS = [
    (make, family, way)
    for make, family in [
        (edit, "llama"),
        (edit, "gpt2"),
        (edit, "gemma2"),
        (edit, "mixtral"),
        (edit, "qwen3_moe"),
        (edit, "gpt_oss"),
        (edit, "qwen3_next"),
        (units, "llama"),
        (units, "gpt2"),
        (units, "qwen3"),
    ]
    for way in WAYS
]


@pytest.mark.parametrize(
    ("make", "family", "way"),
    # Every family of both methods in one of the ways, which take turns.
    pairwise(
        among=CELLS,
        strength=1,
        always=[(make, family, list(WAYS)[number // 2 % 2]) for number, (make, family, _) in enumerate(CELLS)],
    ),
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_what_is_written_is_what_the_hooks_do(
    make: Callable[[str], tuple[Any, SteeringVector]], family: str, way: str, tmp_path: Path
) -> None:
    model, vector = make(family)
    found = WAYS[way](model, None, vector, tmp_path / "out", strength=1.0).verification  # type: ignore[operator]
    assert found.effect > 100 * found.relative, "the edit changes next to nothing"
    assert found.holds
