"""What serving many requests at once costs and gains, as ratios inside one run: `python -m benchmarks.serve`.

Requests go to the engine itself, so that HTTP is in neither side of a ratio. Every figure is the median over
interleaved pairs, with its 95 % bootstrap interval; `--cpu` counts processor seconds, for a machine that does other
things as well.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch

import steerkit
from benchmarks.__main__ import ratio, texts
from benchmarks.results import recorded
from steerkit.serve import Catalogue, Done, Engine, Request
from steerkit.serve.events import Event

STEERINGS = (
    "optimism-caa*1.5",
    "formal-persona*2",
    "pirate-persona*2",
    "warmth-caa*1 + imagery-caa*1",
    "optimism-caa*2 - formal-persona*1",
    "poetic-persona[4:]*2",
    "enthusiasm-caa*0.5 fade(linear over 20)",
    "formality-caa@all*1.5",
)
# As many as these: prompts that are the same and steered in the same way would be read once.
QUESTIONS = (
    "How was your day?",
    "What is the sea?",
    "Tell me a story.",
    "Why do birds sing?",
    "What is a good meal?",
    "Where do rivers begin?",
    "How do I learn to draw?",
    "What makes a good friend?",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs per ratio")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--prompt", type=int, default=400, help="words of the first turn")
    parser.add_argument("--only", default="", help="only the figures whose name holds this")
    parser.add_argument("--cpu", action="store_true", help="count processor seconds instead of seconds")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    options = parser.parse_args()
    with recorded("serve", "Serving", "benchmarks.serve", wanted=options.write, printed=True) as facts:
        model, tokenizer = steerkit.load_model()
        facts["model"] = model
        with Engine(model, tokenizer, Catalogue(model="smollm2-135m")) as engine:
            show(Bench(engine, options), options)


def show(bench: Bench, options: argparse.Namespace) -> None:
    unit = "processor seconds" if options.cpu else "seconds"
    print(f"{torch.get_num_threads()} threads, {options.pairs} pairs each, {unit}, torch {torch.__version__}")
    print(f"{'':<58}{'median':>8}  {'95 % interval':<16}{'aim':>8}")
    steered, plain = bench.requests(STEERINGS), bench.requests([None] * len(STEERINGS))
    works: list[tuple[str, Callable[[], float], Callable[[], float], str]] = [
        (
            "tokens a second, 8 steered at once / 8 unsteered",
            lambda: bench.together(plain),
            lambda: bench.together(steered),
            ">= 0.97",
        ),
        (
            "tokens a second, 8 steered at once / one at a time",
            lambda: bench.in_turn(steered),
            lambda: bench.together(steered),
            ">= 3",
        ),
        ("first token, second turn / first one of that length", bench.second_turn, bench.first_turn, "<= 0.3"),
    ]
    for name, first, second, aim in works:
        if options.only not in name:
            continue
        median, low, high = ratio(first, second, options.pairs)
        print(f"{name:<58}{median:>8.3f}  {f'{low:.3f} to {high:.3f}':<16}{aim:>8}")


class Bench:
    """Requests to one engine, timed."""

    def __init__(self, engine: Engine, options: argparse.Namespace) -> None:
        self.engine, self.options = engine, options
        self.clock = time.process_time if options.cpu else time.perf_counter
        self.seeds = itertools.count()

    def forget(self) -> None:
        """Begin anew, when the engine has nothing more to do."""
        while self.engine.running or self.engine.waiting:
            time.sleep(0.001)
        self.engine.worker.prefixes.clear()

    def requests(self, steerings: Sequence[str | None]) -> list[Request]:
        asked = zip(QUESTIONS, steerings, strict=True)
        return [Request(_chat(text), steering=one, max_tokens=self.options.tokens) for text, one in asked]

    def together(self, requests: Sequence[Request]) -> float:
        """Seconds a token of requests that run at once."""
        self.forget()
        found: SimpleQueue[Event] = SimpleQueue()
        start = self.clock()
        self.engine.submit(*((one, found.put) for one in requests))
        return self._until_done(found, len(requests), start)

    def in_turn(self, requests: Sequence[Request]) -> float:
        """The same, one after the other."""
        self.forget()
        start, tokens = self.clock(), 0
        for one in requests:
            tokens += sum(len(answer.tokens) for answer in self.engine.answers(one))
        return (self.clock() - start) / tokens

    def _until_done(self, found: SimpleQueue[Event], answers: int, start: float) -> float:
        tokens = 0
        while answers:
            event = found.get()
            answers -= isinstance(event, Done)
            tokens += 0 if isinstance(event, Done) else len(event.tokens)
        return (self.clock() - start) / tokens

    def second_turn(self) -> float:
        """Seconds to the first token of a chat's second turn, whose first one has just been answered."""
        turns = self._chat()
        self.engine.answers(Request(turns[:1], steering=STEERINGS[0], max_tokens=8))
        return self._first_token(turns)

    def first_turn(self) -> float:
        """The same of a chat that is new."""
        return self._first_token(self._chat())

    def _first_token(self, turns: list[dict[str, Any]]) -> float:
        start = self.clock()
        self.engine.answers(Request(turns, steering=STEERINGS[0], max_tokens=1))
        return self.clock() - start

    def _chat(self) -> list[dict[str, Any]]:
        """A chat that has not been seen: a long question, an answer and a short question."""
        self.forget()
        words = " ".join(texts(self.options.prompt // 10, seed=next(self.seeds))).split()[: self.options.prompt]
        answer = {"role": "assistant", "content": "It is about a river and a boat."}
        return [*_chat(" ".join(words)), answer, *_chat("And what came of it?")]


def _chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


if __name__ == "__main__":
    main()
