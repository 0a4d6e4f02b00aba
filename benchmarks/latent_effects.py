"""Latents of the shipped dictionary, random ones and CAA at one cost: `python -m benchmarks.latent_effects [--write]`.

Latents are selected on a recipe's training items by activation gap; every vector is measured on the held-out ones at
the strength at which it costs the same KL divergence on neutral texts (see `benchmarks.equal_kl`). Random latents are
drawn from those that fire on the training items. The output score of each latent, its activation gap and the slope of
the margin along it are then asked whether they tell which latents steer.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from steerkit.evaluate.attribution.gradients import products_of_texts
from steerkit.evaluate.attribution.slopes import differentiable
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.output_score import output_scores
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.trial import Answer
from steerkit.maths.probes import auc
from steerkit.methods._latent_reading import rows_tensors
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.recipe import Recipe, find_recipe
from steerkit.vector.steering_vector import SteeringVector

FILE = "dictionaries/smollm2-135m/resid_post.14.safetensors"
KL, TEXTS, TOGETHER, SLOPES = 0.1, 12, 6, 24
RECIPES = {"optimism-caa": (6, 3, 6), "formality-caa": (3, 2, 3)}
"""Of each the latents by gap, by gradient and at random."""
READOUT = "response_mean"
KEPT = Path("out/latents.jsonl")  # measurements, so that a run that was cut off goes on
PUBLISHED = 10.0
WORDS = """At one cost, a KL divergence of 0.1 nats per token on neutral texts: latents of the shipped dictionary
(`{file}`, {site}) and CAA at the same site. Latents are chosen on the
training items: by gap (how much oftener they fire on the positive side), by gradient (how much of the preference margin
they carry, on {slopes} items), or at random of those that fire there. "{together} latents" are the first {together}
together: by gap each as much as its mean gap, by gradient all alike. Effect: change of the preference margin on
held-out items, nats per token. Differences are paired, the same item under both."""


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
        for name, counts in RECIPES.items():
            rows += compare(find_recipe(name), model, tokenizer, dictionary, counts)
        print("Which latents steer\n")
        told(rows)


def compare(
    recipe: Recipe, model: Any, tokenizer: Any, dictionary: Dictionary, counts: tuple[int, int, int]
) -> list[tuple[Candidate, Row]]:
    """Print the table of one recipe; give each latent with what it did."""
    train, held_out = recipe.split()
    setup, behaviour = Setup(model, tokenizer, held_out).first_neutral(TEXTS), recipe.behaviour
    found = kept(f"{behaviour}: known", lambda: known(train, setup, dictionary))
    chosen = candidates(setup, dictionary, found, counts)
    print(f"{behaviour}: {len(train)} items to fit on, {len(held_out)} held out, KL {KL:g} nats per token\n")
    print("| | output score | strength | KL | effect | CAA's effect less this one's | perplexity ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    caa = steerkit.fit(model, tokenizer, train, method="caa", sites=[dictionary.site], readout=READOUT)
    by_gap, by_gradient = found["by_gap"][:TOGETHER], found["by_gradient"][:TOGETHER]
    gaps = torch.tensor(found["mean_gap"])[by_gap].clamp_min(0.0)
    several = {
        "CAA": caa,
        f"{TOGETHER} latents by gap": latents(setup, dictionary, by_gap, (gaps / gaps.max()).tolist()),
        f"{TOGETHER} latents by gradient": latents(setup, dictionary, by_gradient, [1.0] * TOGETHER),
        "random direction": random_like(caa, seed=1),
    }
    own: Row | None = None
    for name, vector in several.items():
        row = shown_row(behaviour, name, vector, setup, own)
        own = row if own is None else own
    rows = []
    for one in chosen:
        vector = latents(setup, dictionary, [one.latent], [1.0])
        rows.append((one, shown_row(behaviour, f"latent {one.latent}, {one.kind}", vector, setup, own, one.output)))
    print()
    return rows


def shown_row(
    behaviour: str, name: str, vector: SteeringVector, setup: Setup, own: Row | None, output: float | None = None
) -> Row:
    """Measure a vector and print its row."""
    key = f"{behaviour}: {name.partition(',')[0]}"
    row = Row.from_json(kept(key, lambda: measured(setup, name, vector, [KL])[0].as_json()))
    score = "-" if output is None else f"{output:.3f}"
    if row.reached is None:
        print(f"| {name} | {score} | - | {row.why} | - | - | - |", flush=True)
        return row
    less = None if own is None else own.beside(row)
    effect, kl, ratio = (shown(row.figures[column]) for column in COLUMNS)
    beside = "-" if less is None else shown(less)
    print(f"| {name} | {score} | {row.reached.strength:.3g} | {kl} | {effect} | {beside} | {ratio} |", flush=True)
    return row


def kept(key: str, measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """What was measured of this dictionary, by an earlier run of this benchmark where there was one."""
    journal = Journal(KEPT, {"dictionary": load_dictionary(FILE).digest, "kl": KL, "texts": TEXTS})
    for row in journal.rows:
        if row["key"] == key:
            found: Mapping[str, Any] = row["found"]
            return found
    found = measure()
    journal.append([{"key": key, "found": found}])
    return found


@functools.cache
def fitted(setup: Setup) -> SteeringVector:
    """One latent as the method fits it, with the unit `peak`."""
    assert setup.data is not None
    few = setup.data.split(held_out=1.0 - 4 / len(setup.data), seed=0)[0]  # a latent that is named needs no data
    settings = {"dictionary": FILE, "latents": [0]}
    return steerkit.fit(setup.model, setup.tokenizer, few, method="latent", settings=settings, readout=READOUT)


def latents(setup: Setup, dictionary: Dictionary, numbers: Sequence[int], amounts: Sequence[float]) -> SteeringVector:
    """Latents as a vector, in the unit `peak`, which is the same for all of them."""
    plain, site = fitted(setup), dictionary.site
    scaled = torch.tensor(amounts) * plain.params(site)["peak"]
    rows = dictionary.rows(list(numbers))
    tensors = {
        **rows_tensors(rows),
        "direction": scaled @ rows.decoder,
        "latents": torch.tensor(numbers, dtype=torch.int64),
        "amounts": scaled,
        "peak": plain.params(site)["peak"],
        "decoder": rows.decoder,
    }
    return replace(
        plain,
        tensors={f"{site}/{name}": one for name, one in tensors.items()},
        settings={**plain.settings, "latents": list(numbers), "amounts": list(amounts)},
    )


def known(train: ContrastSet, setup: Setup, dictionary: Dictionary) -> dict[str, Any]:
    """What the training items say of every latent: gaps, gradients, slopes, and which of them fire at all."""
    acts = steerkit.record(setup.model, setup.tokenizer, train, [dictionary.site], readout=READOUT)
    site = acts.sites[0]
    positive, negative = (dictionary.encode(side[site]) for side in (acts.positive, acts.negative))
    gaps = activation_gap(positive, negative)
    carried, slopes = gradients(some(train), setup, dictionary)
    return {
        "by_gap": [one for one in gaps.order() if gaps.mean_gap[one] > 0],
        "by_gradient": carried.argsort(descending=True).tolist(),
        "share_gap": gaps.share_gap.tolist(),
        "mean_gap": gaps.mean_gap.tolist(),
        "slopes": slopes.tolist(),
        "alive": ((positive > 0).any(0) | (negative > 0).any(0)).nonzero()[:, 0].tolist(),
    }


def some(train: ContrastSet) -> ContrastSet:
    """The training items that gradients are taken on."""
    return train.split(held_out=1.0 - SLOPES / len(train), seed=0)[0]


def gradients(train: ContrastSet, setup: Setup, dictionary: Dictionary) -> tuple[Tensor, Tensor]:
    """How much of the margin each latent carries, and the slope along its row, [k] each, from the same passes."""
    own, scorer = Setup(setup.model, setup.tokenizer, train), differentiable("preference_margin")
    turned = dictionary.rows(range(dictionary.num_latents)).decoder.T

    def told(h: Tensor, gradient: Tensor) -> Tensor:
        rows = []
        for acts, slope in zip(h, gradient, strict=True):
            along = slope @ turned  # [t, k]
            rows.append(torch.cat([(dictionary.encode(acts) * along).sum(0), along.sum(0)]))
        return torch.stack(rows, dim=-1)

    def score(answer: Answer) -> Tensor:
        return scorer.of_text(answer)[None]

    count = 2 * dictionary.num_latents
    _, found = products_of_texts(own, scorer.texts(own), score, fitted(setup), told, count)
    carried, slopes = scorer.of_items(found[:, 0]).mean(dim=-1).chunk(2)
    return carried, slopes


def candidates(
    setup: Setup, dictionary: Dictionary, found: Mapping[str, Any], counts: tuple[int, int, int]
) -> list[Candidate]:
    """The first latents by gap and by gradient, and random ones of those that fire on the training items."""
    by_gap, by_gradient, drawn = counts
    listed = dict.fromkeys(found["by_gap"][:by_gap], "gap")
    left = [one for one in found["alive"] if one not in listed]
    order = torch.randperm(len(left), generator=torch.Generator().manual_seed(1)).tolist()
    random = [left[place] for place in order[:drawn]]
    listed |= dict.fromkeys(
        [one for one in found["by_gradient"] if one not in {*listed, *random}][:by_gradient], "gradient"
    )
    listed |= dict.fromkeys(random, "random")
    numbers = list(listed)
    # As published: ten times the usual strongest latent.
    much = torch.full((len(numbers),), PUBLISHED * float(fitted(setup).params(dictionary.site)["peak"]))
    rows = dictionary.rows(numbers).decoder
    scores = output_scores(setup.model, setup.tokenizer, dictionary.site, rows, amounts=much).scores.tolist()
    return [
        Candidate(one, kind, found["share_gap"][one], scores[place], found["slopes"][one])
        for place, (one, kind) in enumerate(listed.items())
    ]


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
