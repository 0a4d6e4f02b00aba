"""What steering costs vLLM: `python -m benchmarks.vllm`, in vLLM's environment (`make test-vllm` makes it).

Three engines in processes of their own, the same model and eight requests of a length: without this plug-in, with it
and idle, and with every row steered at every block. They answer in turn, one at a time, and what counts is the time of
the processor, so that whatever else the machine does falls on none; a ratio is the median over turns, with its 95 %
bootstrap interval.
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
from pathlib import Path
from typing import Any

BATCH, PROMPT, NEW = 8, 32, 32
KINDS = ("none", "idle", "steered")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--model", default=None, help="folder; the embedded model where none is given")
    options.add_argument("--turns", type=int, default=9)
    options.add_argument("--eager", action="store_true")
    options.add_argument("--settings", default="{}", help="of steerkit, as JSON")
    options.add_argument("--engine", choices=KINDS, help="be one of the engines")
    given = options.parse_args()
    if given.engine:
        serve(given)
        return
    engines = {kind: start(given, kind) for kind in KINDS}
    try:
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in range(given.turns + 1):
            order = random.Random(turn).sample(KINDS, len(KINDS))
            for kind in order:
                seconds = ask(engines[kind])
                if turn:  # the first one warms up
                    times[kind].append(seconds)
        print(f"{BATCH} requests of {PROMPT} tokens, {NEW} new ones each; {given.turns} turns")
        print(f"none: {statistics.median(times['none']):.2f} s")
        for kind in KINDS[1:]:
            middle, low, high = ratio(times[kind], times["none"])
            print(f"{kind} over none: {middle:.3f} ({low:.3f} to {high:.3f})")
    finally:
        for engine in engines.values():
            engine.terminate()


def start(given: argparse.Namespace, kind: str) -> Any:
    """An engine in a process of its own, once it is ready."""
    words = [sys.executable, "-m", "benchmarks.vllm", "--engine", kind, "--settings", given.settings]
    words += ["--model", given.model] if given.model else []
    words += ["--eager"] if given.eager else []
    usual = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    env = {**usual, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if kind == "none":
        env["VLLM_PLUGINS"] = ""
    engine = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    ask(engine)
    return engine


def ask(engine: Any) -> float:
    """Have an engine answer once; the seconds it took."""
    engine.stdin.write("\n")
    engine.stdin.flush()
    for line in engine.stdout:
        if line.startswith("{"):
            return float(json.loads(line)["seconds"])
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
        config = {"steerkit": {"folder": folder, **json.loads(given.settings)}} if given.engine != "none" else {}
        model = given.model or embedded()
        llm = LLM(
            model,
            dtype="float32",
            enforce_eager=given.eager,
            enable_prefix_caching=False,
            additional_config=config,
            **options,
        )
        extra = None
        if given.engine == "steered":
            vector(llm).save(Path(folder) / "all.safetensors")
            extra = {"steering": "all@all*1"}
        params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, extra_args=extra)
        draw = random.Random(0)
        prompts: Any = [{"prompt_token_ids": draw.choices(range(100, 1000), k=PROMPT)} for _ in range(BATCH)]
        for _ in sys.stdin:
            begun = time.process_time()
            llm.generate(prompts, params, use_tqdm=False)
            print(json.dumps({"seconds": time.process_time() - begun}), flush=True)


def embedded() -> str:
    from steerkit.model import ALIASES, converted, embedded_gguf

    return str(converted("smollm2-135m", embedded_gguf(ALIASES["smollm2-135m"])))


def vector(llm: Any) -> Any:
    """A small addition after every block."""
    import torch

    from steerkit.network.sites import Site
    from steerkit.vector.steering_vector import SteeringVector

    text = llm.llm_engine.vllm_config.model_config.hf_text_config
    sites = tuple(Site(layer) for layer in range(text.num_hidden_layers))
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
