"""AUSteer beside random neurons and beside CAA: `python -m benchmarks.units [RECIPE]`.

For several numbers of neurons and several strengths: the preference margin, and what it costs in KL divergence to the
unsteered model on neutral texts, with 95 % intervals over the items. The random neurons are as many at the same sites
with the same gains. CAA is fitted on the same items, by the behaviour's own recipe where there is one.

By default the recipe's training items are fitted on and its held-out items measured. `--validation` parts the training
items instead and leaves the held-out ones alone: that is where neurons, site and strength are to be chosen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import steerkit
from benchmarks.results import recorded
from steerkit.errors import UnknownNameError
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.scoring import Measured, scorer_of
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store import Store
from steerkit.evaluate.sweeps import measure_point
from steerkit.fitting.fitting import read
from steerkit.methods.austeer import AUSteer
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.neutral import neutral_texts
from steerkit.recipe import Recipe, find_recipe
from steerkit.vector.steering_vector import SteeringVector

MARGIN, COST = "preference_margin", "kl"


def main() -> None:
    """Print the comparison as a Markdown table."""
    options = arguments()
    model, tokenizer = steerkit.load_model()
    title = "AUSteer: scaling single neurons"
    with recorded("neurons", title, "benchmarks.units", wanted=options.write, model=model):
        compare(options, model, tokenizer)


def compare(options: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    recipe = find_recipe(options.recipe)
    train, held_out = recipe.split()
    if options.validation:
        train, held_out = train.split(held_out=0.25, seed=1)
    train, held_out = first(train, options.train), first(held_out, options.items)
    calm = neutral_texts()[: options.neutral]
    table = Table(Setup(model, tokenizer, held_out, neutral=calm, batch_size=32), options.draws)
    measured = "training items held back for validation" if options.validation else "held-out items"
    baseline = table.measured(None, None).estimate
    print(f"{recipe.behaviour}: fitted on {len(train)} pairs, measured on {len(held_out)} {measured}")
    unsteered = f"{baseline.mean:+.3f} ({baseline.low:+.3f} to {baseline.high:+.3f})"
    print(f"unsteered margin {unsteered}; below what is added to it\n")
    draws = f"random neurons, mean of {options.draws} draws (lowest to highest)"
    print(f"| method | site | strength | margin | {draws} | KL |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    caa, strengths = addition(recipe, model, tokenizer, train)
    for strength in strengths:
        table.row("CAA", ", ".join(map(str, caa.sites)), caa, strength)
    settings = dict(recipe.method.settings) if recipe.method.name == "austeer" else {}
    readout = options.readout or (recipe.method.readout if recipe.method.name == "austeer" else None)
    decoder = table.setup.decoder
    for kind in options.kinds or [settings.get("kind", AUSteer().kind)]:
        ways = [AUSteer.from_settings({**settings, "kind": kind, "k": k}) for k in options.k]
        sites = ways[0].sites(decoder)
        acts = read(model, tokenizer, train, method=ways[0], sites=sites, readout=readout, batch_size=32)
        for method in ways:
            vector = steerkit.fit(model, tokenizer, train, method=method, sites=sites, acts=acts)
            for strength in options.strengths:
                table.row(
                    f"{method.k} neuron{'s' * (method.k > 1)}",
                    f"`{kind}`, {len(vector.sites)} block{'s' * (len(vector.sites) > 1)}",
                    vector,
                    strength,
                )


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.units")
    parser.add_argument("recipe", nargs="?", default="optimism-austeer", help="whose items are used")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 10, 100], help="numbers of neurons")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--kinds", nargs="+", help="kinds of site; default: the recipe's")
    parser.add_argument("--readout", help="tokens read; default: the recipe's")
    parser.add_argument("--draws", type=int, default=5, help="draws of random neurons")
    parser.add_argument("--neutral", type=int, default=16, help="neutral texts on which the cost is measured")
    parser.add_argument("--train", type=int, help="fit on so many pairs only")
    parser.add_argument("--items", type=int, help="measure on so many pairs only")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    parser.add_argument("--validation", action="store_true", help="part the training items, leave the held-out alone")
    return parser.parse_args()


def first(data: ContrastSet, count: int | None) -> ContrastSet:
    """The first pairs of a set."""
    if count is None or count >= len(data):
        return data
    return ContrastSet(data.positive[:count], data.negative[:count], paired=True, source=data.source)


def addition(recipe: Recipe, model: Any, tokenizer: Any, train: ContrastSet) -> tuple[SteeringVector, list[float]]:
    """CAA on the same items, and the strengths to show it at."""
    try:
        own = find_recipe(f"{recipe.behaviour}-caa")
    except UnknownNameError:
        own = find_recipe("optimism-caa")
    layers, readout, strength = own.method.layers, own.method.readout, own.apply.strength
    assert strength is not None, "recipes that ship an effect suggest a strength"
    vector = steerkit.fit(model, tokenizer, train, method="caa", layers=layers, readout=readout, batch_size=32)
    return vector, [strength / 2, strength]


class Table:
    """Measures vectors on one set of items and prints a row for each."""

    def __init__(self, setup: Setup, draws: int) -> None:
        self.setup, self._draws, self._store = setup, draws, Store()

    def measured(self, vector: SteeringVector | None, strength: float | None, name: str = MARGIN) -> Measured:
        """One figure under a vector."""
        scorer = scorer_of("divergence" if name == COST else name)
        found = measure_point(self.setup, vector, strength, [scorer], identity="", store=self._store)
        return found[name]

    def row(self, title: str, site: str, vector: SteeringVector, strength: float) -> None:
        """Print what a vector does at a strength, beside random ones."""
        own, cost = self.measured(vector, strength).effect, self.measured(vector, strength, COST).effect
        drawn = [self.measured(random_like(vector, seed=seed + 1), strength).effect.mean for seed in range(self._draws)]
        cells = [title, site, f"{strength:g}", interval(own), spread(drawn), interval(cost, ".3f")]
        print(f"| {' | '.join(cells)} |", flush=True)


def interval(found: Any, form: str = "+.3f") -> str:
    """A mean with its interval."""
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"


def spread(means: Sequence[float]) -> str:
    """Mean, lowest and highest of some draws."""
    return f"{sum(means) / len(means):+.3f} ({min(means):+.3f} to {max(means):+.3f})" if means else "-"


if __name__ == "__main__":
    main()
