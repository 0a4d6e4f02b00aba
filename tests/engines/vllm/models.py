"""Tiny random models that vLLM runs on a CPU (its heads are 32 wide at least), and vectors of every edit for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from steerkit.methods._controller_gate import begun
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector
from tests.gated import gated_vector

WIDTH, BLOCKS, VOCAB = 64, 4, 320
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SLIDING = {
    "query_pre_attn_scalar": 32,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * (BLOCKS // 2),
}
_FAMILIES: Mapping[str, Any] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_SIZES)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_SIZES, **_SLIDING)),
}
FAMILIES = tuple(_FAMILIES)
KINDS = {"post": "resid_post", "attn": "attn_out", "mlp": "mlp_out"}
PLANE = {"direction": 1.0, "second": 1.0}


def saved(family: str, folder: Path) -> Path:
    """A folder with a model of a family; the same weights each time."""
    path = folder / family
    if not path.exists():
        torch.manual_seed(7)
        _FAMILIES[family]().save_pretrained(path)
    return path


def loaded(path: Path) -> Any:
    """The model of a folder in transformers, in float32, its attention written out."""
    return tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def vectors(model: Any) -> dict[str, SteeringVector]:
    """Vectors by name: `<edit>-<kind>`, each at two blocks, and gated ones."""
    found = {}
    for seed, (name, kind) in enumerate(KINDS.items()):
        sites = (Site(1, kind), Site(2, kind))

        def made(method: str, edit: str, seed: int = seed, sites: Any = sites, **settings: Any) -> SteeringVector:
            return _vector(model, method, edit, sites, seed, settings)

        found[f"add-{name}"] = made("caa", "add")
        found[f"off-{name}"] = made("ablation", "project_out")
        found[f"set-{name}"] = made("set_projection", "set_projection", origin="other")
        found[f"turn-{name}"] = made("selective", "rotate_by")
        found[f"aim-{name}"] = made("angular", "rotate_to")
        found[f"above-{name}"] = made("angular", "rotate_to_above", adaptive=True, threshold=0.0)
    prompts = {"opens": [(5, 17, 44, 9, 101, 63), (9, 8, 7)], "closes": [(7, 23, 42, 88, 15), (1, 2, 3, 4)]}
    found["late"] = gated_vector(model, size=3.0, **prompts)
    found["early"] = gated_vector(model, read=Site(1), write=[Site(1), Site(2)], size=3.0, **prompts)
    found["mean"] = gated_vector(model, readout="mean", size=3.0, **prompts)
    found["controller"] = _controller(model)
    return found


def _facts(model: Any) -> dict[str, Any]:
    return {"model_type": model.config.model_type, "hidden_size": WIDTH, "num_layers": BLOCKS, "unit": "paper"}


def _vector(
    model: Any, method: str, edit: str, sites: tuple[Site, ...], seed: int, settings: dict[str, Any]
) -> SteeringVector:
    draw = torch.Generator().manual_seed(100 + seed + 10 * len(edit))
    rotates = edit.startswith("rotate")
    tensors = {}
    for site in sites:
        tensors[f"{site}/direction"] = torch.randn(WIDTH, generator=draw) * 3
        if rotates:
            tensors[f"{site}/second"] = torch.randn(WIDTH, generator=draw)
        if edit == "set_projection":
            tensors |= {f"{site}/trait": torch.tensor(9.0), f"{site}/other": torch.tensor(-2.0)}
    return SteeringVector(
        method=method,
        tensors=tensors,
        sites=sites,
        edit=edit,
        scope="all",
        settings=settings,
        norms=dict.fromkeys(sites, 20.0),
        suggested_strength=60.0 if rotates else 1.0,
        **_facts(model),
    )


def _controller(model: Any) -> SteeringVector:
    reads, writes = (Site(1), Site(3)), (Site(1), Site(2))
    draw = torch.Generator().manual_seed(5)
    shared = begun(2 * WIDTH, 64, 2, seed=3)
    return SteeringVector(
        method="controller",
        tensors={
            **shared,
            "shared/mean": torch.zeros(2 * WIDTH),
            "shared/spread": torch.full((2 * WIDTH,), 2.0),
            **{f"{site}/direction": torch.randn(WIDTH, generator=draw) * 6 for site in writes},
        },
        sites=writes,
        fitted_at=reads,
        edit="add_weighted",
        scope="response",
        readout="last",
        settings={"weights": "random", "dead_zone": 0.45},
        suggested_strength=1.0,
        **_facts(model),
    )
