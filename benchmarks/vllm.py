"""What steering costs vLLM: `python -m benchmarks.vllm`, in vLLM's environment (`make test-vllm` makes it).

Three engines in processes of their own, the same model and eight requests of a length: without this plug-in, with it
and idle, and with every row steered at every block (`--kinds` at several places of it). They answer in turn, one at
a time, in an order drawn anew for each turn. Time of the processor leaves out what else the machine does; wall time is
told beside it. A ratio is the median over turns, with its 95 % bootstrap interval. `--twice` puts a second engine
without the plug-in beside the first: what differs between these is noise.
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
ENGINES = ("none", "idle", "steered")
CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--model", default=None, help="folder; the embedded model where none is given")
    options.add_argument("--turns", type=int, default=9)
    options.add_argument("--eager", action="store_true")
    options.add_argument("--kinds", default="resid_post", help="of sites that are written, with commas")
    options.add_argument("--settings", default="{}", help="of steerkit, as JSON")
    options.add_argument("--twice", action="store_true", help="another engine without the plug-in")
    options.add_argument("--engine", choices=ENGINES, help="be one of the engines")
    given = options.parse_args()
    if given.engine:
        serve(given)
        return
    names = [*ENGINES, "none again"] if given.twice else [*ENGINES]
    engines = {name: start(given, name.split()[0]) for name in names}
    try:
        times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for turn in range(given.turns + 1):
            for name in random.Random(turn).sample(names, len(names)):
                seconds = ask(engines[name])
                if turn:  # the first one warms up
                    times[name].append(seconds)
        print(f"{BATCH} requests of {PROMPT} tokens, {NEW} new ones each, at {given.kinds}; {given.turns} turns")
        for clock in CLOCKS:
            plain = [one[clock] for one in times["none"]]
            print(f"{clock}: none {statistics.median(plain):.2f} s")
            for name in names[1:]:
                middle, low, high = ratio([one[clock] for one in times[name]], plain)
                print(f"{clock}: {name} over none {middle:.3f} ({low:.3f} to {high:.3f})")
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
    env = {**usual, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if kind == "none":
        env["VLLM_PLUGINS"] = ""
    engine = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    ask(engine)
    return engine


def ask(engine: Any) -> dict[str, float]:
    """Have an engine answer once; the seconds it took, by clock."""
    engine.stdin.write("\n")
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
        config = {"steerkit": settings} if given.engine != "none" else {}
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
            vector(llm, given.kinds.split(",")).save(Path(folder) / "all.safetensors")
            extra = {"steering": "all@all*1"}
        params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, extra_args=extra)
        draw = random.Random(0)
        prompts: Any = [{"prompt_token_ids": draw.choices(range(100, 1000), k=PROMPT)} for _ in range(BATCH)]
        for _ in sys.stdin:
            begun = {name: clock() for name, clock in CLOCKS.items()}
            llm.generate(prompts, params, use_tqdm=False)
            print(json.dumps({name: clock() - begun[name] for name, clock in CLOCKS.items()}), flush=True)


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
