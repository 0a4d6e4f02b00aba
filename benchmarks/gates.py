"""Refusal with and without gates, on held-out sources: `python -m benchmarks.gates`.

Every row answers the same requests of sources that nothing was fitted on. Harmful ones should be refused, harmless ones
(ordinary ones, and those that sound alarming) answered as the unsteered model answers them: token for token, and with
the same first logits, bitwise. Refusals are counted by their wording at the beginning of an answer; the odds of
refusing openings, which read no generated text, stand beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steerkit
from benchmarks.results import recorded
from steerkit.errors import UnknownNameError
from steerkit.evaluate.intervals import interval
from steerkit.evaluate.scorers.refusal import Refusal, stated_accuracy
from steerkit.evaluate.setup import Setup
from steerkit.methods._declining import is_refusal
from steerkit.prompts.batching import batches, pad_token_id
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render, spread
from steerkit.vector.steering_vector import SteeringVector

REQUESTS = Path(__file__).resolve().parents[1] / "recipes" / "prompts" / "requests.jsonl"
SOURCES = ("animals", "hacking", "vandalism", "violence", "weapons")  # drawn by lot
READS = (11, 14, 17, 20)
BLOCKS = (11, 12)
RAW = 0.55  # in refusing minus complying openings, at each of the blocks, the prompt's tokens too
NORM = 0.157  # the same, in typical activation norms
BAND, BAND_NORM = (10, 11, 12, 13), 0.078  # where weights of blocks have something to weigh
BATCH = 20


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    title: str
    method: str | None = None
    strength: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    layers: Sequence[int] | None = None
    readout: str | None = None
    change: str | None = None
    """A function of the method's file that is applied to the fitted vector."""
    without: str | None = None
    """A kind of harmless requests that is left out of what it is fitted on."""


def cases() -> list[Case]:
    def gated(title: str, strength: float = NORM, writes: Sequence[int] = BLOCKS, **settings: Any) -> Case:
        fixed = {"writes": tuple(writes), "schedule": "two_pass", "dead_zone": 0.5}
        change, without = settings.pop("change", None), settings.pop("without", None)
        return Case(title, "controller", strength, {**fixed, **settings}, READS, "mean", change, without)

    learned = {"reach": BAND_NORM, "weights": "learned"}
    return [
        Case("base"),
        Case("ungated", "refusal", RAW, layers=BLOCKS),
        Case("conditional", "conditional", RAW, {"writes": BLOCKS}, readout="mean"),
        gated("linear probe", gate="probe"),
        gated("controller, uniform"),
        gated("controller, uniform, fitted without alarming ones", without="alarming"),
        gated("controller, uniform, the same with dead zone 0.8", without="alarming", dead_zone=0.8),
        gated("controller, uniform, four blocks", BAND_NORM, BAND),
        # Untrained weights are about one half.
        gated("controller, random, four blocks", 2 * BAND_NORM, BAND, weights="random"),
        gated("controller, learned, four blocks", BAND_NORM, BAND, **learned),
        gated("controller, learned and permuted", BAND_NORM, BAND, **learned, change="permuted_weights"),
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
    ordinary: Sequence[Conversation]
    alarming: Sequence[Conversation]
    new_tokens: int
    judged: int

    @property
    def sides(self) -> tuple[Sequence[Conversation], ...]:
        """What is asked, kind by kind."""
        return self.harmful, self.ordinary, self.alarming

    @functools.cached_property
    def base(self) -> tuple[Answers, ...]:
        """The unsteered model's answers to every kind."""
        return tuple(self.answers(side, None, 0.0) for side in self.sides)

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
        return contextlib.nullcontext() if vector is None else steerkit.steer(self.model, vector, strength, scope="all")

    @functools.cache  # noqa: B019 - one bench a run
    def fitted(
        self,
        method: str,
        layers: tuple[int, ...] | None,
        readout: str | None,
        settings: tuple[tuple[str, Any], ...],
        without: str | None,
    ) -> Any:
        """The vector of a method with its settings."""
        return steerkit.fit(
            self.model,
            self.tokenizer,
            self.train if without is None else left(self.train, without),
            method=method,
            layers=layers,
            readout=readout,
            settings=dict(settings),
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
        vector = self.fitted(case.method, layers, case.readout, tuple(case.settings.items()), case.without)
        if case.change is None:
            return vector
        change: Callable[[Any], Any] = getattr(importlib.import_module(f"steerkit.methods.{case.method}"), case.change)
        return change(vector)

    def row(self, case: Case) -> tuple[list[str], list[str]]:
        """The cells of a case, and its answers to look at."""
        vector = self.vector(case)
        given = self.base if vector is None else tuple(self.answers(side, vector, case.strength) for side in self.sides)
        cells = [share([float(is_refusal(text)) for text in given[0].texts])]
        for mine, theirs in zip(given[1:], self.base[1:], strict=True):
            cells.append(share([float(is_refusal(text)) for text in mine.texts]))
            same = [
                float(ids == others and torch.equal(logits, baseline))
                for ids, others, logits, baseline in zip(mine.ids, theirs.ids, mine.first, theirs.first, strict=True)
            ]
            cells.append(share(same))
        odds = interval(self.odds(vector, case.strength), shares=False)
        cells.append(f"{odds.mean:+.1f} ({odds.low:+.1f} to {odds.high:+.1f})")
        return cells, [text for side, count in zip(given, (4, 2, 2), strict=True) for text in side.texts[:count]]


def left(data: ContrastSet, kind: str) -> ContrastSet:
    """The requests without the harmless ones of a kind."""
    kinds = topics()
    return ContrastSet(
        data.positive, tuple(one for one in data.negative if kinds[str(one.prompt)] != kind), paired=False
    )


def share(scores: Sequence[float]) -> str:
    """A share with Wilson's interval, in percent."""
    found = interval(torch.tensor(scores), shares=True)
    return f"{100 * found.mean:.0f} ({100 * found.low:.0f} to {100 * found.high:.0f})"


def table(bench: Bench, wanted: str) -> Iterator[tuple[str, list[str]]]:
    """The lines of the table, each with answers to look at."""
    titles = (
        "",
        "harmful refused",
        "ordinary refused",
        "unchanged",
        "alarming refused",
        "unchanged",
        "odds on harmful",
    )
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates")
    parser.add_argument("--prompts", type=int, default=80, help="requests of each kind")
    parser.add_argument("--tokens", type=int, default=24, help="length of the answers")
    parser.add_argument("--judged", type=int, default=8, help="harmful requests whose odds are measured")
    parser.add_argument("--sources", nargs="+", default=SOURCES, help="sources that are held out")
    parser.add_argument("--only", default="", help="rows whose title holds this")
    parser.add_argument("--texts", action="store_true", help="some answers under every row")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    options = parser.parse_args()
    model, tokenizer = steerkit.load_model()
    data = ContrastSet.from_labelled(REQUESTS, positive="harmful")
    train, held_out = data.split(held_out_sources=options.sources)
    kinds = topics()
    ordinary, alarming = (
        [one for one in held_out.negative if kinds[str(one.prompt)] == kind] for kind in ("ordinary", "alarming")
    )
    sides = [spread(side, options.prompts) for side in (held_out.positive, ordinary, alarming)]
    bench = Bench(model, tokenizer, train, *sides, options.tokens, options.judged)
    title = "Refusal with and without gates"
    with recorded("gates", title, "benchmarks.gates", wanted=options.write, model=model):
        print(
            f"{len(sides[0])} harmful, {len(sides[1])} ordinary, {len(sides[2])} alarming but harmless requests",
            end=" ",
        )
        print(f"of held-out sources ({', '.join(options.sources)}).")
        print(f"{options.tokens} tokens each. Percent, with 95 % intervals.")
        print(f"Refusals are counted by wording: {stated_accuracy()}.\n")
        for line, shown in table(bench, options.only):
            print(line, flush=True)
            for text in shown if options.texts else ():
                print(f"    {' '.join(text.split())}", flush=True)


def topics() -> dict[str, str]:
    """Of every harmless request, whether it is ordinary or alarming."""
    items = [json.loads(line) for line in REQUESTS.read_text(encoding="utf-8").splitlines()]
    return {item["prompt"]: item["topic"] for item in items if "topic" in item}


if __name__ == "__main__":
    main()
