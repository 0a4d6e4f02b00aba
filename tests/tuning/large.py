"""A checkpoint larger than the memory that `merge` gets; also a program: python -m tests.tuning.large BASE TUNED OUT.

It prints the largest resident memory in excess of what the interpreter had with all modules loaded, in bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from steerkit.export.checkpoint import header, write_values
from tests.killed import resident

WIDTH = 4096


def write_random(folder: Path, *, tensors: int, rows: int, shards: int, seed: int, width: int = WIDTH) -> Path:
    """A sharded checkpoint of random matrices, bfloat16 and float32 in turn, made one matrix at a time."""
    folder.mkdir()
    generator, places, total = torch.Generator().manual_seed(seed), dict[str, str](), 0
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        dtypes = (torch.bfloat16, torch.float32)
        entries = {
            f"model.layers.{number}.weight": torch.empty(rows, width, dtype=dtypes[number % 2], device="meta")
            for number in range(shard, tensors, shards)
        }
        with (folder / name).open("wb") as file:
            file.write(header(entries))
            for tensor, meta in entries.items():
                drawn = torch.randn(rows, width, generator=generator, dtype=torch.float32)
                total += write_values(file, drawn.to(meta.dtype))
                places[tensor] = name
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": width}))
    return folder


def main(base: str, tuned: str, out: str, shard_bytes: str = "200000000") -> None:
    """Merge half of what finetuning has changed."""
    from steerkit.tuning import TaskVector, merge

    torch.set_num_threads(1)
    before = resident()
    found = merge(base, TaskVector.between(base, tuned), out, scale=0.5, shard_bytes=int(shard_bytes))
    said = {"above": resident() - before, "resumed": found.resumed, "changed": len(found.changed)}
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
