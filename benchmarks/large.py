"""What has to stay quick where much is given: a vector of 480 sites, 100,000 items, two processes.

`make bench` prints these lines with the others; `python -m benchmarks.large` prints them alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import steerkit
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["show_large"]

BLOCKS, WIDTH = 80, 8192
KINDS = ("resid_pre", "resid_post", "attn_in", "attn_out", "mlp_in", "mlp_out")
ITEMS, TEXTS = 100_000, 512
"""Items of a file; texts of each side that are fitted on."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large")
    parser.add_argument("--fit", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().fit:
        fit()
    else:
        show_large()


def show_large() -> None:
    """Print a line for each."""
    planned(wide_model(2), of_many_sites(2))  # what is imported and made ready once
    model, vector = wide_model(BLOCKS), of_many_sites(BLOCKS)
    gc.collect()
    gc.freeze()  # nothing that was made before is looked at in between
    line(f"planning a vector of {len(vector.sites)} sites of width {WIDTH:,}", lambda: planned(model, vector), "0.15")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many.safetensors"
        vector.save(path)
        line("loading its file", lambda: SteeringVector.load(path), "0.1")
        rows = Path(folder) / "items.jsonl"
        asked = ({"prompt": f"Question {n}?", "positive": f"Yes, {n}.", "negative": f"No, {n}."} for n in range(ITEMS))
        rows.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
        line(f"reading {ITEMS:,} items of a JSONL file", lambda: ContrastSet.from_jsonl(rows), "3.5")
    (alone, one), (together, both) = (in_processes(count) for count in (1, 2))
    print(f"{f'fit on {2 * TEXTS:,} texts, one process of one thread':<60}{alone:>8.2f} s")
    apart = float((one - both).norm() / one.norm())
    print(
        f"{'the same in two processes':<60}{together:>8.2f} s  {alone / together:.2f} times, {apart:.0e} apart, >= 1.8"
    )


def line(name: str, work: Callable[[], object], aim: str) -> None:
    """The first time, which is what a command pays, and the least of three more."""
    first, *others = (seconds(work) for _ in range(4))
    print(f"{name:<60}{first:>8.3f} s  {f'again {min(others):.3f}':<16}{f'<= {aim}':>8}", flush=True)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def wide_model(blocks: int) -> Any:
    """Blocks of a large model's width, with next to nothing in each."""
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        num_hidden_layers=blocks,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(config).eval()


def of_many_sites(blocks: int) -> SteeringVector:
    """An addition at six kinds of place in every block."""
    generator = torch.Generator().manual_seed(0)
    sites = tuple(Site(layer, kind) for layer in range(blocks) for kind in KINDS)
    return SteeringVector(
        method="caa",
        tensors={f"{site}/direction": torch.randn(WIDTH, generator=generator) for site in sites},
        sites=sites,
        edit="add",
        scope="response",
        unit="paper",
        model_type="llama",
        hidden_size=WIDTH,
        num_layers=blocks,
    )


def planned(model: Any, vector: SteeringVector) -> None:
    """What `steer` does before the context is entered: every place is found, every tensor made ready."""
    steerkit.steer(model, vector, 1.0)


def in_processes(count: int) -> tuple[float, torch.Tensor]:
    """Seconds of a fit that so many processes of one thread share, and its direction."""
    launched = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    done = subprocess.run(
        [sys.executable, *launched, "-m", "benchmarks.large", "--fit"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    told = json.loads(done.stdout.strip().splitlines()[-1])
    return told["seconds"], torch.tensor(told["direction"], dtype=torch.float32)


def fit() -> None:
    """Fit in this process, or as one of several, and print how long it took and what came out."""
    model, tokenizer = steerkit.load_model()
    words = ("river", "stone", "boat", "house", "cloud", "garden", "letter", "winter")
    sides = [
        [f"{mood} {' '.join(words[(n + k) % 8] for k in range(6 + n % 20))} {n}." for n in range(TEXTS)]
        for mood in ("How good it is:", "How bad it is:")
    ]
    data = ContrastSet.from_prompts(*sides)
    with steerkit.split_between_processes():
        start = time.perf_counter()
        vector = steerkit.fit(model, tokenizer, data, method="caa", layers=[15], readout="last")
        took = time.perf_counter() - start
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"seconds": took, "direction": vector.params(vector.sites[0])["direction"].tolist()}))


if __name__ == "__main__":
    main()
