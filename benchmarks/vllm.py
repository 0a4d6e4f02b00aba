"""What steering costs vLLM: `python -m benchmarks.vllm`, in vLLM's environment (`make test-vllm` makes it).

Engines in processes of their own, the same model and eight requests of a length: one without this plug-in, another
one without it, and one with it, which answers plain requests (idle) and requests steered at every block (`--kinds`
at several places of it). They answer in turn, one at a time, in an order drawn anew for each turn; a ratio is the
median over turns, with its 95 % bootstrap interval over turns.

Two processes that do the very same can differ by several per cent for as long as they live: most of the time goes into
reading weights, and how fast that is can depend on the pages in which they lie; no interval over turns holds that. So
weights are put on huge pages in each, the engine without the plug-in is there twice, what steering adds is told within
one process, and a profiled turn tells the time in matrix products, which the plug-in does not touch, from the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH, PROMPT, NEW = 8, 32, 32
ENGINES = ("none", "none again", "plug-in")
# What is timed, with the engine that does it and what that is measured against.
TURNS = {
    "none": ("none", ""),
    "none again": ("none again", "none"),
    "idle": ("plug-in", "none"),
    "steered": ("plug-in", "idle"),
}
PRODUCTS = ("_C::onednn_mm", "aten::mm", "aten::addmm")
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}
CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--model", default=None, help="folder; the embedded model where none is given")
    options.add_argument("--turns", type=int, default=9)
    options.add_argument("--eager", action="store_true")
    options.add_argument("--kinds", default="resid_post", help="of sites that are written, with commas")
    options.add_argument("--settings", default="{}", help="of steerkit, as JSON")
    options.add_argument("--once", action="store_true", help="one engine without the plug-in, and no other")
    options.add_argument("--engine", choices=ENGINES, help="be one of the engines")
    given = options.parse_args()
    if given.engine:
        serve(given)
        return
    left_out = ("none again",) if given.once else ()
    turns = {name: each for name, each in TURNS.items() if name not in left_out}
    engines = {name: start(given, name) for name in ENGINES if name not in left_out}
    try:
        times: dict[str, list[dict[str, float]]] = {name: [] for name in turns}
        for turn in range(given.turns + 1):
            for name in random.Random(turn).sample(list(turns), len(turns)):
                seconds = ask(engines[turns[name][0]], name)
                if turn:  # the first one warms up
                    times[name].append(seconds)
        print(f"{BATCH} requests of {PROMPT} tokens, {NEW} new ones each, at {given.kinds}; {given.turns} turns")
        for clock in CLOCKS:
            of_clock = {name: [one[clock] for one in each] for name, each in times.items()}
            print(f"{clock}: none {statistics.median(of_clock['none']):.2f} s")
            for name, (_, other) in list(turns.items())[1:]:
                middle, low, high = ratio(of_clock[name], of_clock[other])
                print(f"{clock}: {name} over {other} {middle:.3f} ({low:.3f} to {high:.3f})")
        for name, (engine, _) in turns.items():
            found = ask(engines[engine], f"{name}, profiled")
            print(f"profiled: {name} {found['products']:.2f} s in matrix products, {found['rest']:.2f} s in all else")
    finally:
        for engine in engines.values():
            engine.terminate()


def start(given: argparse.Namespace, kind: str) -> Any:
    """An engine in a process of its own, once it is ready."""
    words = [sys.executable, "-m", "benchmarks.vllm", "--engine", kind, "--settings", given.settings]
    words += ["--kinds", given.kinds]
    words += ["--model", given.model] if given.model else []
    words += ["--eager"] if given.eager else []
    usual = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    usual |= HUGE_PAGES
    env = {**usual, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if kind != "plug-in":
        env["VLLM_PLUGINS"] = ""
    engine = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    ask(engine, "none")
    return engine


def ask(engine: Any, what: str) -> dict[str, float]:
    """Have an engine answer once; the seconds it took, by clock or, profiled, by what they went into."""
    engine.stdin.write(f"{what}\n")
    engine.stdin.flush()
    for line in engine.stdout:
        if line.startswith("{"):
            found: dict[str, float] = json.loads(line)
            return found
    raise SystemExit("an engine ended")


def ratio(one: list[float], other: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """The median of ratios within turns, and its 95 % bootstrap interval."""
    ratios, draw = [a / b for a, b in zip(one, other, strict=True)], random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def serve(given: argparse.Namespace) -> None:
    """Be an engine: a line of stdin is a turn."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        options = {"max_model_len": 256, "max_num_seqs": BATCH, "max_num_batched_tokens": 256}
        settings = {"folder": folder, "kinds": given.kinds.split(","), **json.loads(given.settings)}
        config = {"steerkit": settings} if given.engine == "plug-in" else {}
        llm = LLM(
            given.model or embedded(),
            dtype="float32",
            enforce_eager=given.eager,
            enable_prefix_caching=False,
            additional_config=config,
            **options,
        )
        vector(llm, given.kinds.split(",")).save(Path(folder) / "all.safetensors")
        draw = random.Random(0)
        prompts: Any = [{"prompt_token_ids": draw.choices(range(100, 1000), k=PROMPT)} for _ in range(BATCH)]
        for line in sys.stdin:
            extra = {"steering": "all@all*1"} if line.startswith("steered") else None
            params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, extra_args=extra)

            def turn(params: Any = params) -> None:
                llm.generate(prompts, params, use_tqdm=False)

            print(json.dumps(profiled(turn) if "profiled" in line else timed(turn)), flush=True)


def timed(turn: Callable[[], None]) -> dict[str, float]:
    """Seconds by clock."""
    begun = {name: clock() for name, clock in CLOCKS.items()}
    turn()
    return {name: clock() - begun[name] for name, clock in CLOCKS.items()}


def profiled(turn: Callable[[], None]) -> dict[str, float]:
    """Seconds in matrix products and in all else."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        turn()
    spent = {one.key: one.self_cpu_time_total / 1e6 for one in found.key_averages()}
    products = sum(spent.get(name, 0.0) for name in PRODUCTS)
    return {"products": products, "rest": sum(spent.values()) - products}


def embedded() -> str:
    from steerkit.model import ALIASES, converted, embedded_gguf

    return str(converted("smollm2-135m", embedded_gguf(ALIASES["smollm2-135m"])))


def vector(llm: Any, kinds: list[str]) -> Any:
    """A small addition at some places of every block."""
    import torch

    from steerkit.network.sites import Site
    from steerkit.vector.steering_vector import SteeringVector

    text = llm.llm_engine.vllm_config.model_config.hf_text_config
    sites = tuple(Site(layer, kind) for layer in range(text.num_hidden_layers) for kind in kinds)
    draw = torch.Generator().manual_seed(0)
    return SteeringVector(
        method="caa",
        tensors={f"{site}/direction": torch.randn(text.hidden_size, generator=draw) * 0.01 for site in sites},
        sites=sites,
        edit="add",
        scope="all",
        unit="paper",
        model_type=text.model_type,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
    )


if __name__ == "__main__":
    main()
