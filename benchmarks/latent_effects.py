"""Latents of the shipped dictionary, random ones and CAA at one cost: `python -m benchmarks.latent_effects [--write]`.

Latents are selected on a recipe's training items by activation gap; every vector is measured on the held-out ones at
the strength at which it costs the same KL divergence on neutral texts (see `benchmarks.equal_kl`). Random latents are
drawn from those that fire on the training items. The output score of each latent, its activation gap and the slope of
the margin along it are then asked whether they tell which latents steer.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steerkit
from benchmarks.equal_kl import COLUMNS, Row, measured
from benchmarks.results import recorded
from steerkit._support.journal import Journal
from steerkit.dictionary import Dictionary, load_dictionary
from steerkit.dictionary.fitness import check_dictionary
from steerkit.dictionary.selecting import activation_gap
from steerkit.evaluate.attribution.slopes import attribute_all
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.latents import latent_gradients
from steerkit.evaluate.output_score import output_scores
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store_identity import digest_of
from steerkit.maths.probes import auc
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.recipe import Recipe, find_recipe
from steerkit.vector.steering_vector import SteeringVector

FILE = "dictionaries/smollm2-135m/resid_post.14.safetensors"
RECIPES = ("optimism-caa", "formality-caa")
KL, TEXTS, ALONE, CARRIED, DRAWN, TOGETHER, SLOPES = 0.1, 12, 6, 4, 6, 6, 24
READOUT = "response_mean"
KEPT = Path("out/latents.jsonl")  # measurements, so that a run that was cut off goes on
PUBLISHED = 10.0
ONES = (1.0,) * TOGETHER
WORDS = """At one cost, a KL divergence of 0.1 nats per token on neutral texts: latents of the shipped dictionary
(`{file}`, {site}) and CAA at the same site. Latents are chosen on the
training items: by gap (how much oftener they fire on the positive side), by gradient (how much of the preference margin
they carry, on {slopes} items), or at random of those that fire there. "{together} latents" are the first {together}
together: by gap each as much as its mean gap, by gradient all alike. "All latents": every one as much as its mean gap,
which is about CAA's direction as far as the dictionary holds it. Effect: change of the preference margin on held-out
items, nats per token. Differences are paired, the same item under both."""


@dataclass(frozen=True)
class Candidate:
    """One latent, and what is known of it before it steers.

    Attributes:
        latent: its number.
        kind: how it was chosen: by gap, by gradient, or at random.
        gap: difference of the shares of texts in which it fires.
        output: output score.
        slope: of the preference margin along its row on training items, nats per token and unit of length.
    """

    latent: int
    kind: str
    gap: float
    output: float
    slope: float


def main() -> None:
    """Print the comparison as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latent_effects")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    options = parser.parse_args()
    title = "Latents beside random latents and CAA, at one KL divergence"
    with recorded("latents", title, "benchmarks.latent_effects", wanted=options.write) as facts:
        model, tokenizer = steerkit.load_model()
        facts["model"] = model
        dictionary = load_dictionary(Path(FILE))
        print(f"{WORDS.format(file=FILE, site=dictionary.site, together=TOGETHER, slopes=SLOPES)}\n")
        fits = check_dictionary(model, tokenizer, dictionary)
        print(
            f"{dictionary.num_latents} latents; on {fits.tokens} tokens of the neutral texts {fits.fvu:.3f} of the "
            f"variance is left (FVU) and {fits.l0:.1f} latents fire at a token.\n"
        )
        rows: list[tuple[Candidate, Row]] = []
        for name in RECIPES:
            rows += compare(find_recipe(name), model, tokenizer, dictionary)
        print("Which latents steer\n")
        told(rows)


def compare(recipe: Recipe, model: Any, tokenizer: Any, dictionary: Dictionary) -> list[tuple[Candidate, Row]]:
    """Print the table of one recipe; give each latent with what it did."""
    train, held_out = recipe.split()
    setup = Setup(model, tokenizer, held_out).first_neutral(TEXTS)
    chosen = candidates(train, setup, dictionary)
    print(f"{recipe.behaviour}: {len(train)} items to fit on, {len(held_out)} held out, KL {KL:g} nats per token\n")
    print("| | output score | strength | KL | effect | CAA's effect less this one's | perplexity ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    caa = steerkit.fit(model, tokenizer, train, method="caa", sites=[dictionary.site], readout=READOUT)
    own = shown_row("CAA", caa, setup, None)
    listed = {kind: [one.latent for one in chosen if one.kind == kind] for kind in ("gap", "gradient")}
    several = {
        f"{TOGETHER} latents by gap": together(train, setup, dictionary, listed["gap"][:TOGETHER]),
        f"{TOGETHER} latents by gradient": latent(setup, train, carried(train, setup, dictionary)[:TOGETHER], ONES),
        "all latents": together(train, setup, dictionary, range(dictionary.num_latents), signed=True),
        "random direction": random_like(caa, seed=1),
    }
    for name, vector in several.items():
        shown_row(name, vector, setup, own)
    found = []
    for one in chosen:
        vector = latent(setup, train, (one.latent,), (1.0,))
        found.append((one, shown_row(f"latent {one.latent}, {one.kind}", vector, setup, own, one.output)))
    print()
    return found


def shown_row(name: str, vector: SteeringVector, setup: Setup, own: Row | None, output: float | None = None) -> Row:
    """Measure a vector and print its row."""
    row = kept(name, vector, setup)
    score = "-" if output is None else f"{output:.3f}"
    if row.reached is None:
        print(f"| {name} | {score} | - | {row.why} | - | - | - |", flush=True)
        return row
    less = None if own is None else own.beside(row)
    effect, kl, ratio = (shown(row.figures[column]) for column in COLUMNS)
    beside = "-" if less is None else shown(less)
    print(f"| {name} | {score} | {row.reached.strength:.3g} | {kl} | {effect} | {beside} | {ratio} |", flush=True)
    return row


def kept(name: str, vector: SteeringVector, setup: Setup) -> Row:
    """What `measured` says of a vector, from an earlier run of this benchmark where there was one."""
    key = digest_of([vector.digest, KL, TEXTS, [pair[0].text for pair in setup.pairs]])
    journal = Journal(KEPT, {"of": "benchmarks.latents"})
    for row in journal.rows:
        if row["key"] == key:
            return Row.from_json(row["row"])
    (found,) = measured(setup, name, vector, [KL])
    journal.append([{"key": key, "row": found.as_json()}])
    return found


@functools.cache
def latent(setup: Setup, train: ContrastSet, latents: tuple[int, ...], amounts: tuple[float, ...]) -> SteeringVector:
    """Latents as a vector, in the unit `peak`."""
    settings = {"dictionary": FILE, "latents": list(latents), "amounts": list(amounts)}
    few = train.split(held_out=1.0 - 4 / len(train), seed=0)[0]  # latents that are named need no data
    return steerkit.fit(setup.model, setup.tokenizer, few, method="latent", settings=settings, readout=READOUT)


def together(
    train: ContrastSet, setup: Setup, dictionary: Dictionary, latents: Sequence[int], *, signed: bool = False
) -> SteeringVector:
    """Several latents, each as much as its mean gap; the largest counts 1, and negative gaps nothing unless signed."""
    positive, negative = sides(train, setup, dictionary)
    gaps = activation_gap(positive, negative).mean_gap[list(latents)]
    gaps = gaps if signed else gaps.clamp_min(0.0)
    return latent(setup, train, tuple(latents), tuple((gaps / gaps.max()).tolist()))


@functools.cache
def carried(train: ContrastSet, setup: Setup, dictionary: Dictionary) -> tuple[int, ...]:
    """Latents by how much of the margin they carry on some training items, the most first."""
    gradients = latent_gradients(Setup(setup.model, setup.tokenizer, some(train)), dictionary)
    return tuple(gradients.argsort(descending=True).tolist())


def some(train: ContrastSet) -> ContrastSet:
    """The training items that gradients are taken on."""
    return train.split(held_out=1.0 - SLOPES / len(train), seed=0)[0]


def sides(train: ContrastSet, setup: Setup, dictionary: Dictionary) -> tuple[Tensor, Tensor]:
    """The latents of both sides [n, k], of the mean over each answer's tokens."""
    acts = steerkit.record(setup.model, setup.tokenizer, train, [dictionary.site], readout=READOUT)
    site = acts.sites[0]
    return dictionary.encode(acts.positive[site]), dictionary.encode(acts.negative[site])


def candidates(train: ContrastSet, setup: Setup, dictionary: Dictionary) -> list[Candidate]:
    """The first latents by gap and by gradient, and random ones of those that fire on the training items."""
    positive, negative = sides(train, setup, dictionary)
    gaps = activation_gap(positive, negative)
    order = [one for one in gaps.order() if gaps.mean_gap[one] > 0]
    alive = ((positive > 0).any(0) | (negative > 0).any(0)).nonzero()[:, 0].tolist()
    left = [one for one in alive if one not in order[:ALONE]]
    drawn = torch.randperm(len(left), generator=torch.Generator().manual_seed(1))[:DRAWN].tolist()
    kinds = dict.fromkeys(order[:ALONE], "gap") | {left[one]: "random" for one in drawn}
    new = [one for one in carried(train, setup, dictionary) if one not in kinds][:CARRIED]
    listed = {**dict.fromkeys(order[:ALONE], "gap"), **dict.fromkeys(new, "gradient"), **kinds}
    latents = list(listed)
    rows, much = dictionary.rows(latents).decoder, amounts(setup, train, dictionary, latents)
    scored = output_scores(setup.model, setup.tokenizer, dictionary.site, rows, amounts=much).scores.tolist()
    along = slopes(setup, train, dictionary, latents)
    return [
        Candidate(one, kind, float(gaps.share_gap[one]), scored[place], along[place])
        for place, (one, kind) in enumerate(listed.items())
    ]


def amounts(setup: Setup, train: ContrastSet, dictionary: Dictionary, latents: Sequence[int]) -> Tensor:
    """How much of each latent the output score writes, [k]: ten times the usual strongest latent, as published."""
    peak = latent(setup, train, (latents[0],), (1.0,)).params(dictionary.site)["peak"]
    return torch.full((len(latents),), PUBLISHED * float(peak))


def slopes(setup: Setup, train: ContrastSet, dictionary: Dictionary, latents: Sequence[int]) -> list[float]:
    """The slope of the preference margin along each latent's row of length 1, on some training items."""
    vectors = [latent(setup, train, (one,), (1.0,)) for one in latents]
    found = attribute_all(Setup(setup.model, setup.tokenizer, some(train)), vectors, controls=0)
    lengths = [float(torch.linalg.vector_norm(one.params(dictionary.site)["direction"].float())) for one in vectors]
    return [one.total.estimate.mean / length for one, length in zip(found, lengths, strict=True)]


def told(rows: Sequence[tuple[Candidate, Row]]) -> None:
    """How well each score tells which latents steer."""
    known = [(one, row.figures["preference_margin"]) for one, row in rows if row.reached is not None]
    steers = [effect.low > 0 for _, effect in known]
    print(f"{sum(steers)} of {len(steers)} latents raise the margin clearly (95 % interval of the effect above 0).\n")
    print("| score | AUC for telling them | rank correlation with the effect |")
    print("| --- | --- | --- |")
    scores: Mapping[str, list[float]] = {
        "output score": [one.output for one, _ in known],
        "activation gap": [one.gap for one, _ in known],
        "slope on training items": [one.slope for one, _ in known],
    }
    effects = torch.tensor([effect.mean for _, effect in known])
    for name, values in scores.items():
        plus = torch.tensor([value for value, good in zip(values, steers, strict=True) if good])
        minus = torch.tensor([value for value, good in zip(values, steers, strict=True) if not good])
        area = f"{auc(plus, minus):.2f}" if len(plus) and len(minus) else "-"
        print(f"| {name} | {area} | {ranked(torch.tensor(values), effects):+.2f} |")
    print()


def ranked(one: Tensor, other: Tensor) -> float:
    """Spearman's correlation."""
    ranks = torch.stack([one.argsort().argsort().double(), other.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])


def shown(found: Estimate) -> str:
    """A figure with its interval."""
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


if __name__ == "__main__":
    main()
