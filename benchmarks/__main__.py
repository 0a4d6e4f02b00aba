"""Timings as ratios inside one run, on the embedded model and of the baseline operators: `make bench`.

Every ratio is the median over interleaved pairs (A then B, B then A, ...), with its 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import steerkit
from benchmarks.large import show_large
from benchmarks.latents import beside_plain, of_latents
from benchmarks.peers import by_peers
from benchmarks.results import recorded
from steerkit.activations.moments import Means
from steerkit.activations.streaming import stream
from steerkit.export.baking import bake
from steerkit.maths import edits
from steerkit.methods.austeer import AUSteer, activation_momentum
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.batching import batches, pad_token_id
from steerkit.prompts.chat_roles import Roles
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.recipe.finding import find_recipe
from steerkit.vector.hold import Hold
from steerkit.vector.steering_vector import SteeringVector
from steerkit.vector.when import When

Timing = Callable[[], tuple[float, float, float]]
CLOCK = [time.perf_counter]
BATCH = 16  # texts per pass where activations are read
TITLES = {"speed": "Speed and memory", "operators": "Speed of the operators"}
WORDS = ("river", "carried", "small", "boat", "past", "stone", "houses", "while", "children", "counted", "birds")


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs per ratio")
    parser.add_argument("--operators", action="store_true", help="only the operators, without a model")
    parser.add_argument("--only", default="", help="only the timings of the model whose name holds this")
    parser.add_argument("--cpu", action="store_true", help="CPU time, which other programs disturb less; one thread")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cpu:
        torch.set_num_threads(1)
        CLOCK[0] = time.process_time
    page = "operators" if options.operators else "speed"
    with recorded(page, TITLES[page], "benchmarks", wanted=options.write, printed=True) as facts:
        run(options, facts)


def run(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    if options.operators:
        show_operators(options.pairs)
        return
    if options.peak:
        print(peak_of_extraction(options.peak))
        return
    model, tokenizer = steerkit.load_model()
    facts["model"] = model
    pairs = options.pairs

    def paired(make: Callable[[], tuple[Callable[[], object], Callable[[], object]]]) -> Timing:
        return lambda: ratio(*make(), pairs)

    works: list[tuple[str, Timing, str]] = [
        *(
            (
                f"extraction, 30 layers, {name}{'' if shares else ', whole texts'} / baseline forward",
                paired(functools.partial(extraction, model, tokenizer, data, readout, shares=shares)),
                aim,
            )
            for name, data, readout, shares, aim in (
                ("prompts", contrast(64), "mean", True, "<= 1.02"),
                ("prompts", contrast(64), "mean", False, ""),
                ("answer pairs", answer_pairs(32), "response_mean", True, "<= 0.75"),
                ("answer pairs", answer_pairs(32), "response_mean", False, ""),
            )
        ),
        *(
            (
                f"extraction, prompts, by {name} / baseline forward",
                paired(functools.partial(extraction_by, name, model, tokenizer)),
                "",
            )
            for name in by_peers(model, tokenizer, [], BATCH)
        ),
        (
            "generation, 100 units in 30 blocks / baseline",
            paired(lambda: generation(model, tokenizer, 1, hundred_units(model))),
            "<= 1.028",
        ),
        (
            "generation, 100 units baked / untouched",
            lambda: baked_ratio(model, tokenizer, hundred_units(model), pairs),
            "1.00",
        ),
        (
            "generation, 30 additions baked / untouched",
            lambda: baked_ratio(model, tokenizer, every_block(model), pairs),
            "new biases",
        ),
    ]
    for batch in (1, 8):
        for scope, aim in (("response", "<= 1.01"), ("answer", "<= 1.03")):
            name = f"generation, 30 blocks steered (scope {scope}) / baseline, batch {batch}"
            vector = every_block(model).at(scope=scope)
            steered = functools.partial(generation, model, tokenizer, batch, vector, is_chat=scope == "answer")
            works.append((name, paired(steered), aim))
        for opens, over in ((True, "ungated"), (True, "baseline"), (False, "baseline")):
            name = f"generation, 30 blocks gated ({'open' if opens else 'closed'}) / {over}, batch {batch}"
            gated = functools.partial(gates, model, tokenizer, batch, opens=opens, over=over)
            works.append((name, paired(gated), "<= 1.04" if over != "ungated" else "<= 1.05"))
        # What opens a gate costs one further pass for each prompt, however long its answer is.
        longer = functools.partial(gates, model, tokenizer, batch, opens=True, over="baseline", count=96)
        works.append((f"the same, open, in answers of 96 tokens / baseline, batch {batch}", paired(longer), "<= 1.04"))
        for kind, aim in COMPOSED.items():
            name = f"composition, {kind} / one shared vector, batch {batch}"
            works.append((name, paired(functools.partial(composed, model, tokenizer, batch, kind)), aim))
    works += [
        (
            "generation, a latent added at a site / a plain addition",
            paired(lambda: beside_plain(answering(model, tokenizer, 1), model)),
            "<= 1.01",
        ),
        (
            "generation, 8 latents clamped at a site / baseline",
            paired(lambda: generation(model, tokenizer, 1, of_latents(model, "clamp", 8).at(1.0))),
            "<= 1.05",
        ),
    ]
    works.append(("a steered block over a bare hook, us", lambda: over_bare_hooks(model, tokenizer, pairs), "<= 15"))
    print(f"{torch.get_num_threads()} threads, {options.pairs} pairs each, torch {torch.__version__}")
    print(f"{'':<70}{'median':>8}  {'95 % interval':<16}{'aim':>8}", flush=True)
    for name, work, aim in works:
        if options.only in name:
            median, low, high = work()
            print(f"{name:<70}{median:>8.3f}  {f'{low:.3f} to {high:.3f}':<16}{aim:>8}", flush=True)
    if options.only:
        return
    print(f"{'entering and leaving a context of 30 blocks':<48}{entering(model):>6.1f} ms")
    small, large = (peak_in_a_new_process(count) for count in (128, 1024))
    print(f"{'extraction, peak above the model, 128 prompts':<48}{small:>6.0f} MB")
    print(f"{'extraction, peak above the model, 1024 prompts':<48}{large:>6.0f} MB  {'flat':>22}")
    show_scoring()
    show_large()
    show_operators(options.pairs)


def show_scoring() -> None:
    """Time to score the units of 30 layers of width 576 on 100 pairs: at once, and unit by unit."""
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 100, 30, 576, generator=generator).half()
    whole = min(timed(lambda: activation_momentum(positive, negative)) for _ in range(5))
    looped = timed(lambda: shares_in_a_loop(positive, negative))
    print(f"{'scoring 17,280 units on 100 pairs, at once':<48}{1000 * whole:>6.1f} ms")
    times = f"{looped / whole:.0f} times"
    print(f"{'the same unit by unit, as in the reference':<48}{1000 * looped:>6.0f} ms  {times:>22}")


def shares_in_a_loop(positive: torch.Tensor, negative: torch.Tensor) -> list[float]:
    """The signed share of every unit, counted by one comparison after the other."""
    shares = []
    for layer in range(positive.shape[1]):
        for unit in range(positive.shape[2]):
            apart = positive[:, layer, unit] - negative[:, layer, unit]
            up, down = (apart > 0).float().mean().item(), (apart < 0).float().mean().item()
            shares.append(-down if down > up else up)
    return shares


def show_operators(pairs: int) -> None:
    """Time of each operator at one site over that of the baseline addition, for a decoding step and for a prompt."""
    print(
        f"\n{'one site, float32, over the baseline addition':<48}{'median':>8}  {'95 % interval':<16}{'per token':>12}"
    )
    for width in (576, 3584):
        for tokens in (1, 256):
            loops = 400 if tokens == 1 else 20
            works = {name: repeated(work, loops) for name, work in operators(width, tokens).items()}
            baseline = works["add"]
            each = min(timed(baseline) for _ in range(5)) / loops / tokens * 1e6
            print(f"{f'add, width {width}, {tokens} tokens':<48}{1:>8}  {'':<16}{each:>9.2f} us")
            for name, work in works.items():
                if name != "add":
                    median, low, high = ratio(work, baseline, pairs)
                    where = f"{name}, width {width}, {tokens} tokens"
                    print(f"{where:<48}{median:>8.2f}  {f'{low:.2f} to {high:.2f}':<16}{each * median:>9.2f} us")


def operators(width: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """What a hook computes in each pass, everything prepared as `Method.prepare` does when attached."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, tokens, width, generator=generator)
    first, second = torch.randn(2, width, generator=generator)
    basis = edits.plane(first, second, h.dtype)
    unit, target = basis[0].clone(), torch.tensor(2.0)
    gamma = torch.zeros(width).index_fill(0, torch.arange(0, width, width // 3), 2.0)
    share, moved, ray = torch.tensor(1.0), edits.turning(basis, 40.0), edits.heading(40.0, basis)
    return {
        "add": lambda: edits.add(h, first),
        "scale_units": lambda: edits.scale_units(h, gamma),
        "project_out": lambda: edits.project_out(h, unit, share=share, is_unit=True),
        "set_projection": lambda: edits.set_projection(h, unit, target, is_unit=True),
        "rotate_by": lambda: edits.turn(h, basis, *moved),
        "rotate_to": lambda: edits.aim(h, basis, ray),
        "rotate_to, adaptive": lambda: edits.aim(h, basis, ray, 0.0),
    }


def repeated(work: Callable[[], Any], loops: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(loops):
            work()

    return run


def texts(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 40, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[(row * 7 + place * 3) % len(WORDS)] for place in range(length))
        for row, length in enumerate(lengths)
    ]


def ratio(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> tuple[float, float, float]:
    """Time of `first` over time of `second`: median of interleaved pairs, with its interval."""
    return middle([one / other for one, other in interleaved(first, second, pairs)])


def interleaved(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> list[tuple[float, float]]:
    """Times of both, which take turns in coming first."""
    first(), second()
    found = []
    for number in range(pairs):
        order = (first, second) if number % 2 == 0 else (second, first)
        times = {id(work): timed(work) for work in order}
        found.append((times[id(first)], times[id(second)]))
    return found


def middle(found: list[float]) -> tuple[float, float, float]:
    """The median of what pairs gave, with its interval."""
    values = torch.tensor(found, dtype=torch.double)
    generator = torch.Generator().manual_seed(0)
    draws = values[torch.randint(len(found), (4000, len(found)), generator=generator)].quantile(0.5, dim=1)
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return float(values.quantile(0.5)), low, high


def timed(work: Callable[[], Any]) -> float:
    """Seconds; what `work` measured itself, where it gives a number."""
    start = CLOCK[0]()
    own = work()
    return own if isinstance(own, float) else CLOCK[0]() - start


def contrast(count: int) -> ContrastSet:
    listed = texts(count)
    return ContrastSet.from_prompts(listed[: count // 2], listed[count // 2 :])


def answer_pairs(count: int) -> ContrastSet:
    """The first pairs of a shipped set: two answers to a question each."""
    data = find_recipe("optimism-caa").items()
    return replace(data, positive=data.positive[:count], negative=data.negative[:count], marks=())


def extraction(
    model: Any, tokenizer: Any, data: ContrastSet, readout: str, *, shares: bool
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    sites = [Site(layer) for layer in range(find_decoder(model).num_layers)]

    def ours() -> None:
        means = {site: Means() for site in sites}
        stream(model, tokenizer, data, means, readout=readout, batch_size=BATCH, shares=shares)

    return ours, bare_passes(model, tokenizer, data)


def extraction_by(name: str, model: Any, tokenizer: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same by another library, of the prompts as they are rendered, over the same bare passes."""
    data = contrast(64)
    sides = (
        [render(tokenizer, Conversation.of(item)).text for item in side] for side in (data.positive, data.negative)
    )
    return by_peers(model, tokenizer, list(zip(*sides, strict=True)), BATCH)[name], bare_passes(model, tokenizer, data)


def bare_passes(model: Any, tokenizer: Any, data: ContrastSet) -> Callable[[], None]:
    """The same sorted batches through the same decoder body; rendering them is part of it."""
    decoder = find_decoder(model)
    pairs = [side for pair in zip(data.positive, data.negative, strict=True) for side in pair]
    rendered = [render(tokenizer, Conversation.of(item)) for item in pairs]
    work = batches(rendered, BATCH, pad_id=pad_token_id(tokenizer), groups=2)

    def run() -> None:
        for item in pairs:
            render(tokenizer, Conversation.of(item))
        with torch.no_grad():
            for batch in work:
                positions = (batch.attention_mask.cumsum(1) - 1).clamp_min(0)
                decoder.body(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    position_ids=positions,
                    use_cache=False,
                )

    return run


def generation(
    model: Any, tokenizer: Any, batch: int, vector: SteeringVector, *, is_chat: bool = False
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    run = answering(model, tokenizer, batch, is_chat=is_chat)
    return lambda: run(vector), lambda: run(None)


def over_bare_hooks(model: Any, tokenizer: Any, pairs: int) -> tuple[float, float, float]:
    """Microseconds a block and pass that steering takes over hooks that add a tensor and do nothing else."""
    run, vector = answering(model, tokenizer, 1), every_block(model)
    blocks, passes = find_decoder(model).blocks, 24

    def bare() -> float:
        directions = [vector.params(site)["direction"] for site in vector.sites]
        with contextlib.ExitStack() as stack:
            for block, direction in zip(blocks, directions, strict=True):
                hook = block.register_forward_hook(lambda _module, _args, output, own=direction: output + own)
                stack.callback(hook.remove)
            return run(None)

    times = interleaved(lambda: run(vector), bare, pairs)
    return middle([1e6 * (ours - its) / passes / len(blocks) for ours, its in times])


def baked_ratio(model: Any, tokenizer: Any, vector: SteeringVector, pairs: int) -> tuple[float, float, float]:
    """Time of a checkpoint with a vector in its weights over that of the model it was made of."""
    with tempfile.TemporaryDirectory(prefix="steerkit-") as folder:
        bake(model, tokenizer, vector.at(scope="all"), f"{folder}/baked", strength=1.0)
        baked, _ = steerkit.load_model(f"{folder}/baked", dtype=model.dtype)
    inputs = tokenizer("Tell me about number 0.", return_tensors="pt")
    options = {**inputs, "max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}

    def answers(which: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                which.generate(**options)

        return run

    return ratio(answers(baked), answers(model), pairs)


def gates(
    model: Any, tokenizer: Any, batch: int, *, opens: bool, over: str, count: int = 24
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Generation with a gate that reads two thirds up, so that an open one feeds the last prompt token again."""
    plain, read = every_block(model), Site(20)
    vector = replace(
        plain,
        method="conditional",
        edit="add_where",
        readout="last",
        fitted_at=(read,),
        tensors={
            **plain.tensors,
            "shared/condition": torch.ones(1, plain.hidden_size),
            "shared/layer": torch.tensor([read.layer]),
            "shared/threshold": torch.tensor([-2.0 if opens else 2.0], dtype=torch.double),
            "shared/above": torch.tensor([True]),
        },
    )
    run = answering(model, tokenizer, batch, count=count)
    return lambda: run(vector), lambda: run(plain if over == "ungated" else None)


def answering(
    model: Any, tokenizer: Any, batch: int, *, is_chat: bool = False, count: int = 24
) -> Callable[[Any], float]:
    """Seconds that answers of some tokens take under some vectors, or none."""
    asked = [f"Tell me about number {row}." for row in range(batch)]
    if is_chat:
        asked = [render(tokenizer, Conversation.of(one)).text for one in asked]
    inputs = tokenizer(asked, return_tensors="pt", padding=True, add_special_tokens=not is_chat)
    roles = Roles(tokenizer)
    options = {**inputs, "max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}

    def run(steered: Any) -> float:
        with (
            torch.no_grad(),
            contextlib.nullcontext() if steered is None else steerkit.steer(model, steered, 1.0, tokenizer=roles),
        ):
            return timed(lambda: model.generate(**options))

    return run


COMPOSED = {
    "a vector per row": "<= 1.01",
    "a fade": "<= 1.01",
    "a gate per token, open": "<= 1.05",
    "a gate per token, closed": "<= 1.05",
    "a held reading": "",
}


def composed(model: Any, tokenizer: Any, batch: int, kind: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Generation under a composition over that under one shared vector, at three blocks as shipped vectors are."""
    plain = additions(model, (12, 14, 16))
    scale = {"mean": 0.0, "deviation": 1.0}
    neutral = {
        read: {"joint": 1.0, "sites": {str(site): scale for site in plain.sites}}
        for read in ("prompt_last", "response_mean")
    }
    read = replace(plain, neutral=neutral)
    sign = ">" if kind.endswith("open") else "<"
    with_it: dict[str, Callable[[], Any]] = {
        "a vector per row": lambda: [[additions(model, (12, 14, 16), seed=row).at(1.0)] for row in range(batch)],
        "a fade": lambda: plain.at(1.0, fade="linear over 99"),
        "a held reading": lambda: plain.at(hold=Hold("it", 0.0, (-0.1, 1.0), read)),
    }
    gated = When.parse(f"it {sign} -1e9 per token").bound(lambda _: read)
    steered = with_it.get(kind, lambda: plain.at(1.0, when=gated))()
    run = answering(model, tokenizer, batch)
    return lambda: run(steered), lambda: run(plain)


def every_block(model: Any) -> SteeringVector:
    """A small addition at the output of every block."""
    return additions(model, range(find_decoder(model).num_layers))


def additions(model: Any, layers: Iterable[int], seed: int = 0) -> SteeringVector:
    """A small addition at the outputs of some blocks."""
    decoder = find_decoder(model)
    sites = tuple(map(Site, layers))
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector(
        method="caa",
        tensors={f"{site}/direction": 0.01 * torch.randn(decoder.hidden_size, generator=generator) for site in sites},
        sites=sites,
        edit="add",
        scope="response",
        unit="paper",
        model_type="llama",
        hidden_size=decoder.hidden_size,
        num_layers=decoder.num_layers,
    )


def hundred_units(model: Any) -> SteeringVector:
    """Units of the heads, three or four in every block, scaled a little."""
    decoder = find_decoder(model)
    sites = AUSteer().sites(decoder)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, site in enumerate(sites):
        count = 100 * (number + 1) // len(sites) - 100 * number // len(sites)
        tensors[f"{site}/units"] = torch.randperm(decoder.hidden_size, generator=generator)[:count]
        tensors[f"{site}/beta"] = torch.full((count,), 0.1)
        tensors[f"{site}/width"] = torch.tensor(decoder.hidden_size)
    return replace(
        every_block(model),
        method="austeer",
        edit="scale_units",
        scope="all",
        sites=tuple(sites),
        tensors=tensors,
        settings=AUSteer().settings,
    )


def entering(model: Any) -> float:
    """Milliseconds to plan, attach and remove a steering of all 30 blocks, once per `with`."""
    vector = every_block(model)

    def work() -> None:
        with steerkit.steer(model, vector, 1.0):
            pass

    work()
    return 1000 * min(timed(work) for _ in range(5))


def peak_of_extraction(count: int) -> float:
    """Megabytes by which reading `count` prompts at all layers lifts the process's peak."""
    model, tokenizer = steerkit.load_model()
    sites = [Site(layer) for layer in range(find_decoder(model).num_layers)]

    def read(prompts: int) -> None:
        means = {site: Means() for site in sites}
        stream(model, tokenizer, contrast(prompts), means, readout="mean", batch_size=16, shares=True)

    read(32)  # what is allocated once, buffers of threads and of the batch, is no growth
    # Loading the model lifts the process's peak far above what follows, so start the peak anew (Linux).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = kilobytes("VmRSS")
    read(count)
    return (kilobytes("VmHWM") - before) / 1024


def kilobytes(entry: str) -> float:
    """One line of what Linux says of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return float(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{entry}:")))


def peak_in_a_new_process(count: int) -> float:
    command = [sys.executable, "-m", "benchmarks", "--peak", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
