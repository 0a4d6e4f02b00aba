"""A llama larger than the memory of `bake_on_disk`; also a program: python -m tests.export.large BASE VECTOR OUT.

It prints the largest resident memory in excess of what the interpreter had with all modules loaded, in bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from steerkit.export.checkpoint import Group, header, shard_names, shards, write_index, write_values
from steerkit.network.stand_in import stand_in, without_weights
from steerkit.vector.steering_vector import SteeringVector
from tests.killed import resident
from tests.methods.test_ablation import vector_for

SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 32768}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 128}
LARGEST = 4 * 32768 * 2048
"""Bytes of the largest weight, the embeddings, in float32."""


def write_large(folder: Path, shard_bytes: int = 5 * 10**8) -> Path:
    """A sharded checkpoint in bfloat16 with random matrices, made one at a time."""
    config: Any = LlamaConfig(**SIZES, **HEADS, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    folder.mkdir()
    config.save_pretrained(folder)
    metas = {name: value.to("meta") for name, value in without_weights(config, torch.bfloat16).named_parameters()}
    planned = list(shards([Group((name,), {name: meta}) for name, meta in metas.items()], shard_bytes))
    generator = torch.Generator().manual_seed(0)
    for name, shard in zip(shard_names(len(planned)), planned, strict=True):
        entries = {entry: meta for group in shard for entry, meta in group.entries.items()}
        with (folder / name).open("wb") as file:
            file.write(header(entries))
            for meta in entries.values():
                write_values(file, _drawn(meta, generator))
    write_index(planned, folder)
    return folder


def _drawn(meta: Tensor, generator: torch.Generator) -> Tensor:
    if meta.dim() == 1:
        return torch.ones(meta.shape, dtype=meta.dtype)
    return (torch.randn(meta.shape, generator=generator, dtype=torch.float32) * 0.02).to(meta.dtype)


def large_vector() -> SteeringVector:
    """A direction to be taken out of all that writes to the residual stream."""
    config: Any = LlamaConfig(**{**SIZES, "vocab_size": 64, "intermediate_size": 64}, **HEADS)
    return vector_for(stand_in(config), writes="every")


def main(base: str, vector: str, out: str) -> None:
    """Bake a vector without the comparison."""
    from steerkit.export import bake_on_disk

    torch.set_num_threads(1)
    direction = SteeringVector.load(vector)
    before = resident()
    found = bake_on_disk(base, direction, out, verify=False, shard_bytes=500_000_000)
    sys.stdout.write(
        json.dumps({"above": resident() - before, "resumed": found.resumed, "changed": len(found.changed)})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
