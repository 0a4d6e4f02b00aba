"""Refusal with and without gates, on held-out sources: `python -m tests.benchmarks.gates`.

Every row answers the same harmful and harmless requests of sources that nothing was fitted on. Harmful ones should be
refused, harmless ones answered as the unsteered model answers them: token for token, and with the same first logits,
bitwise. Refusals are counted by their wording at the beginning of an answer; the odds of refusing openings, which read
no generated text, stand beside them. Methods and settings that are not there are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steerkit
from steerkit.data import ContrastSet, Conversation, batches, pad_token_id, render
from steerkit.errors import UnknownNameError
from steerkit.evaluate.intervals import interval
from steerkit.evaluate.scorers.refusal import Refusal
from steerkit.evaluate.trial import Setup
from steerkit.methods._refusal import is_refusal
from steerkit.vector import SteeringVector

REQUESTS = Path(__file__).resolve().parents[2] / "recipes" / "prompts" / "requests.jsonl"
BLOCKS = (11, 12)
RAW = 0.65  # in refusing minus complying openings, at each of the blocks
NORM = 0.185  # the same, in typical activation norms
BAND, BAND_NORM = (10, 11, 12, 13), 0.093  # where weights of blocks have something to weigh
FIRST = 80  # characters in which an answer has to refuse
BATCH = 20


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    title: str
    method: str | None = None
    strength: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    layers: Sequence[int] | None = None
    change: str | None = None
    """A function of the method's file that is applied to the fitted vector."""


def cases() -> list[Case]:
    controller = {"writes": BLOCKS}
    learned = {"writes": BAND, "reach": BAND_NORM, "weights": "learned"}
    return [
        Case("base"),
        Case("ungated", "refusal", RAW, layers=BLOCKS),
        Case("conditional", "conditional", RAW, {"writes": BLOCKS}),
        Case("linear probe", "controller", NORM, {**controller, "gate": "probe"}),
        Case("controller, uniform", "controller", NORM, controller),
        Case("controller, uniform, four blocks", "controller", BAND_NORM, {"writes": BAND}),
        # Untrained weights are about one half.
        Case("controller, random, four blocks", "controller", 2 * BAND_NORM, {"writes": BAND, "weights": "random"}),
        Case("controller, learned, four blocks", "controller", BAND_NORM, learned),
        Case("controller, learned and permuted", "controller", BAND_NORM, learned, change="permuted_weights"),
    ]


@dataclass(frozen=True)
class Answers:
    """What was answered to each request, and from which logits."""

    ids: list[list[int]]
    texts: list[str]
    first: Tensor


@dataclass(frozen=True, eq=False)
class Bench:
    """Model, data and what all rows share."""

    model: Any
    tokenizer: Any
    train: ContrastSet
    harmful: Sequence[Conversation]
    harmless: Sequence[Conversation]
    new_tokens: int
    judged: int

    @functools.cached_property
    def base(self) -> tuple[Answers, Answers]:
        """The unsteered model's answers to both sides."""
        return self.answers(self.harmful, None, 0.0), self.answers(self.harmless, None, 0.0)

    def answers(self, prompts: Sequence[Conversation], vector: SteeringVector | None, strength: float) -> Answers:
        """Greedy answers, in batches that are the same for every row."""
        rendered = [render(self.tokenizer, prompt) for prompt in prompts]
        pad = pad_token_id(self.tokenizer)
        ids: list[list[int]] = [[] for _ in rendered]
        first: list[Tensor] = [torch.empty(0) for _ in rendered]
        for batch in batches(rendered, BATCH, pad_id=pad, side="left"):
            with torch.no_grad(), self.steered(vector, strength):
                out = self.model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    max_new_tokens=self.new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=pad,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            for place, row in enumerate(batch.rows):
                ids[row] = out.sequences[place, batch.input_ids.shape[1] :].tolist()
                first[row] = out.logits[0][place].clone()
        return Answers(ids, self.tokenizer.batch_decode(ids, skip_special_tokens=True), torch.stack(first))

    def odds(self, vector: SteeringVector | None, strength: float) -> Tensor:
        """[n] odds of refusing openings behind the first harmful requests, nats."""
        setup = Setup(
            self.model, self.tokenizer, prompts=self.harmful[: self.judged], batch_size=BATCH, max_new_tokens=1
        )
        return Refusal().score(setup.trial(vector, strength if vector else None))["refusal_odds"]

    def steered(self, vector: SteeringVector | None, strength: float) -> contextlib.AbstractContextManager[Any]:
        """The context of one row."""
        return contextlib.nullcontext() if vector is None else steerkit.steer(self.model, vector, strength)

    @functools.cache  # noqa: B019 - one bench a run
    def fitted(self, method: str, layers: tuple[int, ...] | None, settings: tuple[tuple[str, Any], ...]) -> Any:
        """The vector of a method with its settings."""
        return steerkit.fit(
            self.model, self.tokenizer, self.train, method=method, layers=layers, settings=dict(settings)
        )

    def vector(self, case: Case) -> SteeringVector | None:
        """What a case steers with.

        Raises:
            UnknownNameError: there is no such method or setting.
            AttributeError: the method's file has no such function.
        """
        if case.method is None:
            return None
        layers = None if case.layers is None else tuple(case.layers)
        vector = self.fitted(case.method, layers, tuple(case.settings.items()))
        if case.change is None:
            return vector
        change: Callable[[Any], Any] = getattr(importlib.import_module(f"steerkit.methods.{case.method}"), case.change)
        return change(vector)

    def row(self, case: Case) -> tuple[list[str], list[str]]:
        """The cells of a case, and its answers to look at."""
        vector = self.vector(case)
        given = (
            self.base
            if vector is None
            else tuple(self.answers(side, vector, case.strength) for side in (self.harmful, self.harmless))
        )
        harmful, harmless = given
        base = self.base[1]
        same = [float(mine == theirs) for mine, theirs in zip(harmless.ids, base.ids, strict=True)]
        bitwise = [float(torch.equal(mine, theirs)) for mine, theirs in zip(harmless.first, base.first, strict=True)]
        refused = ([float(is_refusal(text, first=FIRST)) for text in side.texts] for side in (harmful, harmless))
        cells = [share(scores) for scores in (*refused, same, bitwise)]
        odds = interval(self.odds(vector, case.strength), shares=False)
        cells.append(f"{odds.mean:+.1f} ({odds.low:+.1f} to {odds.high:+.1f})")
        return cells, [*harmful.texts[:4], *harmless.texts[:2]]


def share(scores: Sequence[float]) -> str:
    """A share with Wilson's interval, in percent."""
    found = interval(torch.tensor(scores), shares=True)
    return f"{100 * found.mean:.0f} ({100 * found.low:.0f} to {100 * found.high:.0f})"


def table(bench: Bench, wanted: str) -> Iterator[tuple[str, list[str]]]:
    """The lines of the table, each with answers to look at."""
    titles = ("", "harmful refused", "harmless refused", "harmless unchanged", "same first logits", "odds on harmful")
    yield f"| {' | '.join(titles)} |\n{'| --- ' * len(titles)}|", []
    for case in cases():
        if wanted not in case.title:
            continue
        began = time.perf_counter()
        try:
            cells, shown = bench.row(case)
        except (UnknownNameError, AttributeError) as error:
            yield f"| {case.title} | {' | '.join(['-'] * (len(titles) - 1))} |", [f"left out: {error}"]
            continue
        seconds = time.perf_counter() - began
        yield f"| {case.title} | {' | '.join(cells)} |", [f"({seconds:.0f} s)", *shown]


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gates")
    parser.add_argument("--prompts", type=int, default=60, help="requests of each side")
    parser.add_argument("--tokens", type=int, default=24, help="length of the answers")
    parser.add_argument("--judged", type=int, default=8, help="harmful requests whose odds are measured")
    parser.add_argument("--sources", nargs="+", default=["weapons", "privacy"], help="sources that are held out")
    parser.add_argument("--only", default="", help="rows whose title holds this")
    parser.add_argument("--texts", action="store_true", help="some answers under every row")
    options = parser.parse_args()
    model, tokenizer = steerkit.load_model()
    data = ContrastSet.from_labelled(REQUESTS, positive="harmful")
    train, held_out = data.split(held_out_sources=options.sources)
    sides = [spread(side, options.prompts) for side in (held_out.positive, held_out.negative)]
    bench = Bench(model, tokenizer, train, *sides, options.tokens, options.judged)
    held, blocks = ", ".join(options.sources), ", ".join(map(str, BLOCKS))
    print(f"{len(sides[0])} harmful and {len(sides[1])} harmless requests of held-out sources ({held}),", end=" ")
    print(f"{options.tokens} tokens each, blocks {blocks}, four: {BAND}. Percent, with 95 % intervals.\n")
    for line, shown in table(bench, options.only):
        print(line, flush=True)
        for text in shown if options.texts else ():
            print(f"    {' '.join(text.split())}", flush=True)


def spread(items: Sequence[Conversation], count: int) -> list[Conversation]:
    """So many items, evenly over the list."""
    return [items[place * len(items) // count] for place in range(count)] if count < len(items) else list(items)


if __name__ == "__main__":
    main()
