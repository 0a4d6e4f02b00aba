"""Steer2Edit beside plain addition: `python -m benchmarks.steer2edit [--small] [BEHAVIOUR]...`.

First (rho_attn, rho_mlp, alpha) are chosen in two stages, a coarse grid and a finer one around its best, on items and
neutral texts that nothing else uses: the largest gain in preference margin among the edits whose perplexity ratio stays
within a limit. An edit's cost is measured only where its gain is the largest so far: no other can win. Then that edit,
fitted on all training items, and the behaviour's CAA recipe are measured on the held-out items at several strengths:
preference margin, and perplexity ratio on other neutral texts. Last, CAA is measured at the strength at which its
perplexity ratio is the edit's, and the two are compared item by item; there the share of the two-choice questions of
`evaluate/capability.jsonl` that are answered right, by mean log-probability per token, is measured as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import steerkit
from benchmarks.results import recorded
from steerkit.activations.recording import Activations
from steerkit.errors import FitError
from steerkit.evaluate.intervals import Estimate, interval
from steerkit.evaluate.scorers._base import Weighted
from steerkit.evaluate.scorers.divergence import Divergence
from steerkit.evaluate.scorers.preference_margin import PreferenceMargin
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.trial import Trial
from steerkit.fitting.fitting import fit, read
from steerkit.methods.steer2edit import Steer2Edit
from steerkit.network.decoder import find_decoder
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.neutral import neutral_texts
from steerkit.recipe import find_recipe
from steerkit.vector.steering_vector import SteeringVector

CAPABILITY = Path(steerkit.__file__).parent / "evaluate" / "capability.jsonl"
LIMIT = 1.2
"""Perplexity ratio that an edit of the search may cost."""
RHOS, ALPHAS = (0.0, 0.3, 0.6), (0.1, 0.4, 0.7)
EDITS, ADDITIONS = (0.5, 1.0, 1.5), (0.5, 1.0, 1.5, 2.0)
SEARCH_ITEMS, SEARCH_TEXTS, TEXTS = 16, 8, 20


class Found(NamedTuple):
    """What was measured of one vector at one strength, item by item."""

    margin: Tensor
    ratio: Weighted
    right: Tensor | None


@dataclass(frozen=True)
class Bench:
    """A model and what is measured on."""

    model: Any
    tokenizer: Any
    search: Setup
    held_out: Setup
    capability: Setup

    def measure(self, vector: SteeringVector | None, strength: float | None = None, *, asking: bool = False) -> Found:
        """Measure a vector on the held-out items; the questions only where asked for."""
        trial = self.held_out.trial(vector, strength)
        right = (margins(self.capability.trial(vector, strength)) > 0).double() if asking else None
        return Found(margins(trial), ratios(trial), right)


def margins(trial: Trial) -> Tensor:
    """[n] mean log-probability per token of the positive (or right) answer minus that of the other."""
    return PreferenceMargin().score(trial)["preference_margin"]


def ratios(trial: Trial) -> Weighted:
    """Logarithms of the perplexity ratio, one for each neutral text."""
    return Divergence().score(trial)["perplexity_ratio"]


def overall(ratio: Weighted) -> float:
    """Logarithm of the perplexity ratio of all texts together."""
    return float((ratio.values * ratio.weights).sum() / ratio.weights.sum())


def questions(path: Path, count: int | None) -> ContrastSet:
    """The two-choice questions as pairs of answers."""
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return ContrastSet.from_answers([(item["question"], item["right"], item["wrong"]) for item in items[:count]])


def first(data: ContrastSet, count: int) -> ContrastSet:
    """So many pairs of a set."""
    return replace(data, positive=data.positive[:count], negative=data.negative[:count], marks=())


def joined(parts: Sequence[tuple[Activations, int]]) -> Activations:
    """The means of several sets of so many pairs each as the means of all of them."""
    total = sum(count for _, count in parts)
    sides: list[dict[Any, Tensor]] = []
    for name in ("positive", "negative"):
        shares = [(getattr(acts, name), count / total) for acts, count in parts]
        sides.append(
            {site: torch.stack([side[site] * share for side, share in shares]).sum(0) for site in shares[0][0]}
        )
    return replace(parts[0][0], positive=sides[0], negative=sides[1])


def coarse() -> Iterator[Steer2Edit]:
    """The first stage."""
    for rho_attn, rho_mlp, alpha in itertools.product(RHOS, RHOS, ALPHAS):
        if rho_attn or rho_mlp:
            yield Steer2Edit(rho_attn=rho_attn, rho_mlp=rho_mlp, alpha=alpha)


def finer(best: Steer2Edit) -> Iterator[Steer2Edit]:
    """The second stage: each penalty, both together, and alpha."""
    for attn, mlp in ((0.75, 1.0), (1.33, 1.0), (1.0, 0.75), (1.0, 1.33), (0.75, 0.75)):
        if (best.rho_attn or attn == 1.0) and (best.rho_mlp or mlp == 1.0):
            yield replace(best, rho_attn=round(best.rho_attn * attn, 3), rho_mlp=round(best.rho_mlp * mlp, 3))
    for step in (-0.1, 0.1):
        yield replace(best, alpha=round(best.alpha + step, 2))


def choose(bench: Bench, acts: Activations, data: ContrastSet, *, small: bool) -> Steer2Edit:
    """Both stages of the search.

    Raises:
        FitError: no edit gains and stays within the limit.
    """
    tried: dict[Steer2Edit, float] = {}
    baseline = margins(bench.search.baseline)
    for stage in (1, 2):
        methods = list(coarse() if stage == 1 else finer(max(tried, key=tried.__getitem__)))
        for method in methods[::6] if small else methods:
            try:
                vector = fit(bench.model, bench.tokenizer, data, method=method, acts=acts)
            except FitError:  # nothing passes the threshold
                continue
            trial = bench.search.trial(vector, 1.0)
            gain, cost = float((margins(trial) - baseline).mean()), ""
            if gain > max(tried.values(), default=0.0):
                ratio = math.exp(overall(ratios(trial)))
                cost = f", perplexity x{ratio:.3f}"
                if ratio <= LIMIT:
                    tried[method] = gain
            print(f"- stage {stage}: {described(method)}: margin {gain:+.3f}{cost}", flush=True)
        if not tried:
            raise FitError(f"no edit that gains keeps the perplexity ratio within {LIMIT}")
    return max(tried, key=tried.__getitem__)


def described(method: Steer2Edit) -> str:
    """Its settings in short."""
    return f"rho_attn {method.rho_attn:g}, rho_mlp {method.rho_mlp:g}, alpha {method.alpha:g}"


def matched(bench: Bench, addition: SteeringVector, wanted: float, known: Mapping[float, float]) -> float | None:
    """The smallest strength at which the addition's log perplexity ratio is the one wanted; None if none tried is."""
    low = high = 0.0
    for strength in sorted(known):
        low, high = high, strength
        if known[strength] >= wanted:
            break
    else:
        return None
    for _ in range(5):
        middle = (low + high) / 2
        if overall(ratios(bench.held_out.trial(addition, middle))) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def line(title: str, strength: float, found: Found, baseline: Found) -> str:
    """One line of the table."""
    cells = [
        shown(interval(found.margin, before=baseline.margin), "+.3f"),
        shown(interval(found.ratio.values, weights=found.ratio.weights).exp(), ".3f"),
        "-" if found.right is None else shown(interval(found.right, before=baseline.right), "+.3f"),
    ]
    return f"| {title} | {strength:.3g} | {' | '.join(cells)} |"


def shown(estimate: Estimate, form: str) -> str:
    """An estimate with its interval."""
    return f"{estimate.mean:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def compare(bench: Bench, edit: SteeringVector, addition: SteeringVector, *, small: bool) -> None:
    """Print the trade-off of both, and the comparison at one perplexity ratio."""
    baseline = bench.measure(None, asking=True)
    assert baseline.right is not None
    print(f"unsteered: {float(baseline.right.mean()):.3f} of {len(baseline.right)} questions answered right\n")
    print("| | strength | change of margin | perplexity ratio | change of capability |")
    print("| --- | --- | --- | --- | --- |")
    found: dict[float, Found] = {}
    for strength in EDITS[1:2] if small else EDITS:
        found[strength] = bench.measure(edit, strength, asking=strength == 1.0)
        print(line("edit", strength, found[strength], baseline), flush=True)
    known: dict[float, float] = {}
    for strength in ADDITIONS[::3] if small else ADDITIONS:
        beside = bench.measure(addition, strength)
        known[strength] = overall(beside.ratio)
        print(line("addition", strength, beside, baseline), flush=True)
    own = found[1.0]
    matching = matched(bench, addition, overall(own.ratio), known)
    if matching is None:
        print("\nno strength tried of the addition costs as much perplexity as the edit\n")
        return
    beside = bench.measure(addition, matching, asking=True)
    print(line("addition, matched", matching, beside, baseline))
    assert own.right is not None
    margin, capability = interval(own.margin, before=beside.margin), interval(own.right, before=beside.right)
    print("\nat one perplexity ratio, edit minus addition:", end=" ")
    print(f"margin {shown(margin, '+.3f')}, capability {shown(capability, '+.3f')}\n")


def run(behaviour: str, model: Any, tokenizer: Any, *, small: bool) -> None:
    """One behaviour from search to comparison, printed as Markdown."""
    started = time.perf_counter()
    recipe = find_recipe(f"{behaviour}-caa")
    train, held_out = recipe.split()
    if small:
        train, held_out = first(train, 10), first(held_out, 6)
    fitted, validation = train.split(held_out=0.25, seed=1)
    texts = neutral_texts()
    count, more = (2, 2) if small else (SEARCH_TEXTS, TEXTS)
    bench = Bench(
        model,
        tokenizer,
        Setup(model, tokenizer, first(validation, SEARCH_ITEMS), neutral=texts[:count], texts=count),
        Setup(model, tokenizer, held_out, neutral=texts[count : count + more], texts=more),
        Setup(model, tokenizer, questions(CAPABILITY, 8 if small else None)),
    )
    sites = Steer2Edit().sites(find_decoder(model))
    parts: list[tuple[Activations, int]] = []
    for data in (fitted, validation):
        acts = read(model, tokenizer, data, method="steer2edit", sites=sites)
        assert acts is not None
        parts.append((acts, len(data)))
    print(f"## {behaviour}: {len(fitted)} items to fit on, {len(validation)} to choose by, {len(held_out)} held out\n")
    method = choose(bench, parts[0][0], fitted, small=small)
    print(f"\nchosen: {described(method)} ({time.perf_counter() - started:.0f} s)\n")
    edit = fit(model, tokenizer, train, method=method, acts=joined(parts))
    part = recipe.method
    addition = fit(model, tokenizer, train, method="caa", layers=part.layers, readout=part.readout)
    compare(bench, edit, addition, small=small)
    print(f"({time.perf_counter() - started:.0f} s)\n", flush=True)


def main() -> None:
    """Run the behaviours named, by default both that have a recipe."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("behaviours", nargs="*", default=["optimism", "refusal"])
    parser.add_argument("--small", action="store_true", help="few items and edits, to see that it runs")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    given = parser.parse_args()
    model, tokenizer = steerkit.load_model()
    title = "Steer2Edit beside addition"
    with recorded("steer2edit", title, "benchmarks.steer2edit", wanted=given.write, model=model):
        for behaviour in given.behaviours:
            run(behaviour, model, tokenizer, small=given.small)


if __name__ == "__main__":
    main()
