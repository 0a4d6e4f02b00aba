"""Inference-Time Intervention beside random heads and beside CAA, at one cost: `python -m benchmarks.heads [--write]`.

Each vector is fitted on a recipe's training items and measured on its held-out ones, at the strength at which it costs
the same KL divergence on neutral texts (see `benchmarks.equal_kl`). Beside ITI's heads, the best by their probes, stand
heads drawn at random that are shifted along what the same fit learned for them, which tells what the choice of heads is
worth; and random heads shifted along random directions of the same lengths, which tells what learning is worth at all.
Differences are paired: the same item under ITI and under the other.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

import steerkit
from benchmarks.equal_kl import COLUMNS, Row, measured
from benchmarks.results import recorded
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.setup import Setup
from steerkit.maths.probes import head_count
from steerkit.methods.iti import InferenceTimeIntervention
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.recipe import Recipe, find_recipe
from steerkit.vector.steering_vector import SteeringVector

RECIPES, BLOCKS = ("optimism-iti", "truthful-iti"), "12,14,16"
KL, TEXTS, CHOSEN, DRAWN = 0.1, 16, 2, 2
WORDS = """At one cost, a KL divergence of 0.1 nats per token on neutral texts: ITI (13 heads), CAA on the same items,
and their controls. "Random heads, their learned shifts" are drawn from all 270, each shifted along what the same fit
learned for it, so the choice of heads is what ITI has over them; "random heads and directions" have nothing learned.
Effect: change of the preference margin on held-out items, nats per token. Differences are paired, the same item under
both."""


def main() -> None:
    """Print the comparison as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heads")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    options = parser.parse_args()
    title = "ITI beside random heads and CAA, at one KL divergence"
    with recorded("heads", title, "benchmarks.heads", wanted=options.write) as facts:
        model, tokenizer = steerkit.load_model()
        facts["model"] = model
        print(f"{WORDS}\n")
        for name in RECIPES:
            compare(find_recipe(name), model, tokenizer)


def compare(recipe: Recipe, model: Any, tokenizer: Any) -> None:
    """Print the table of one recipe."""
    train, held_out = recipe.split()
    setup = Setup(model, tokenizer, held_out).first_neutral(TEXTS)
    print(f"{recipe.behaviour}: {len(train)} items to fit on, {len(held_out)} held out, KL {KL:g} nats per token\n")
    print("| | strength | KL | effect | ITI's effect less this one's | perplexity ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    own: Row | None = None
    for name, vector in vectors(recipe, train, setup).items():
        (row,) = measured(setup, name, vector, [KL])
        if row.reached is None:
            print(f"| {name} | - | {row.why} | - | - | - |", flush=True)
            continue
        own = row if own is None else own
        less = None if row is own else own.beside(row)
        effect, kl, ratio = (shown(row.figures[column]) for column in COLUMNS)
        beside = "-" if less is None else shown(less)
        print(f"| {name} | {row.reached.strength:.3g} | {kl} | {effect} | {beside} | {ratio} |", flush=True)
    print()


def vectors(recipe: Recipe, train: ContrastSet, setup: Setup) -> dict[str, SteeringVector]:
    """ITI, CAA and their controls, fitted on the same items."""
    model, tokenizer, readout = setup.model, setup.tokenizer, recipe.method.readout
    how: dict[str, Any] = {"readout": readout, "settings": recipe.method.settings}
    iti = steerkit.fit(model, tokenizer, train, method="iti", **how)
    caa = steerkit.fit(model, tokenizer, train, method="caa", layers=BLOCKS, readout=readout)
    heads = head_count(model) * setup.decoder.num_layers
    every = steerkit.fit(model, tokenizer, train, method=InferenceTimeIntervention(heads=heads), readout=readout)
    found = {"ITI": iti, f"CAA at blocks {BLOCKS}": caa}
    for seed in range(1, CHOSEN + 1):
        found[f"random heads {seed}, their learned shifts"] = some_heads(
            every, int(recipe.method.settings["heads"]), seed
        )
    for seed in range(1, DRAWN + 1):
        found[f"random heads and directions {seed}"] = random_like(iti, seed=seed)
    found["CAA, random directions"] = random_like(caa, seed=1)
    return found


def some_heads(every: SteeringVector, count: int, seed: int) -> SteeringVector:
    """Some of the heads of a vector that shifts all of them, drawn at random."""
    sizes = [len(every.params(site)["accuracy"]) for site in every.sites]
    drawn = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))[:count]
    marks = torch.split(torch.zeros(sum(sizes)).index_fill(0, drawn, 1.0), sizes)
    kept = dict(every.tensors)
    for site, mark in zip(every.sites, marks, strict=True):
        shifts = every.params(site)["direction"].reshape(len(mark), -1)
        kept[f"{site}/direction"] = (shifts * mark[:, None]).flatten()
    sites = tuple(site for site, mark in zip(every.sites, marks, strict=True) if bool(mark.any()))
    names = {"shared", *map(str, sites)}
    tensors = {name: one for name, one in kept.items() if name.partition("/")[0] in names}
    return replace(every, sites=sites, fitted_at=None, tensors=tensors)


def shown(found: Estimate) -> str:
    """A figure with its interval."""
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


if __name__ == "__main__":
    main()
