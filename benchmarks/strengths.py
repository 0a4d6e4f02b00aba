"""What a strength costs: `python -m benchmarks.strengths [--model NAME]...`.

Two tables. The first: how equal the cost of `unit="norm"` is, over blocks, directions and models, for four lengths that
a unit could be. The second: the strength that `extract` suggests, and what it costs on texts it was not measured on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import steerkit
from benchmarks.results import recorded
from steerkit.activations.recording import record
from steerkit.activations.token_scale import TokenScale
from steerkit.errors import SteerError
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.scoring import measure
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.suggesting import MAX_KL, suggest_strength
from steerkit.network.sites import Site
from steerkit.prompts.neutral import neutral_texts
from steerkit.recipe import find_recipe
from steerkit.vector.steering_vector import SteeringVector

STRENGTH = 0.1
BEHAVIOURS, RANDOM = ("optimism", "formality"), 2
BLOCKS, TEXTS, OTHERS = 6, 4, 12
RECIPES = (
    "enthusiasm-caa",
    "formality-caa",
    "imagery-caa",
    "optimism-caa",
    "refusal-caa",
    "warmth-caa",
    "optimism-actadd",
    "optimism-selective",
    "optimism-iti",
)
NOTE = (
    "The second model is Gemma 3 270M (`steerkit fetch gemma3-270m`), a base model in 4 bits, dequantised. A rotation "
    "(`optimism-selective`) is at its end at 180 degrees, whatever that costs."
)
MEASURES = ("median token norm", "distance from the mean", "the same, per dimension", "spread (mean of the last two)")


def lengths(scale: TokenScale, direction: Tensor) -> tuple[float, ...]:
    """What one unit would be by each of `MEASURES`, along a direction [d]."""
    common, both = scale.spread(), scale.spread(direction)
    return scale.norm, common, both**2 / common, both


def cost(setup: Setup, vector: SteeringVector, strength: float) -> float:
    """KL divergence on the setup's neutral texts, nats per token."""
    return measure(setup.trial(vector, strength), ["divergence"])["kl"].estimate.mean


def costs_of_a_tenth(model: Any, tokenizer: Any) -> Iterator[tuple[int, str, list[float]]]:
    """Block, direction and the cost of a tenth of a unit by each measure."""
    setup = Setup(model, tokenizer, neutral=neutral_texts()[:TEXTS])
    last = setup.decoder.num_layers - 1
    ends = (math.ceil(0.2 * last), math.floor(0.8 * last))
    blocks = sorted({round(ends[0] + (ends[1] - ends[0]) * step / (BLOCKS - 1)) for step in range(BLOCKS)})
    sites = [Site(block) for block in blocks]
    scales = record(model, tokenizer, neutral_texts()[20:50], sites).scales
    fitted = {}
    for behaviour in BEHAVIOURS:
        train, _ = find_recipe(f"{behaviour}-caa").split()
        for site in sites:
            fitted[site, behaviour] = steerkit.fit(model, tokenizer, train, sites=[site], readout="response_mean")
    for site in sites:
        vectors = {name: fitted[site, name] for name in BEHAVIOURS}
        vectors |= {f"random {seed}": random_like(vectors[BEHAVIOURS[0]], seed=seed) for seed in range(RANDOM)}
        for name, vector in vectors.items():
            direction = vector.params(site)["direction"]
            length = float(torch.linalg.vector_norm(direction))
            units = lengths(scales[site], direction)
            yield site.layer, name, [cost(setup, vector, STRENGTH * unit / length) for unit in units]


def equal_costs(models: dict[str, tuple[Any, Any]]) -> None:
    """Print how far the cost of a tenth of a unit varies, by measure."""
    found = [
        (name, block, direction, costs)
        for name, (model, tokenizer) in models.items()
        for block, direction, costs in costs_of_a_tenth(model, tokenizer)
    ]
    columns = " | ".join(f"{name}, behaviours | {name}, random" for name in models)
    print(f"KL divergence at strength {STRENGTH:g} of a unit that is as long as the measure says, over blocks at 20 to")
    print("80 % of the depth, smallest to largest; the last columns are largest over smallest of all models.\n")
    print(f"| measure | {columns} | ratio, behaviours | ratio, all |")
    print("| --- |" + " --- |" * (2 * len(models) + 2))
    for place, measure_name in enumerate(MEASURES):
        cells = []
        for name in models:
            for wanted in (False, True):
                own = [one[3][place] for one in found if one[0] == name and one[2].startswith("random") == wanted]
                cells.append(f"{min(own):.2g} to {max(own):.2g}")
        for behaviours in (True, False):
            every = [one[3][place] for one in found if not (behaviours and one[2].startswith("random"))]
            cells.append(f"{max(every) / min(every):.3g}")
        print(f"| {measure_name} | {' | '.join(cells)} |", flush=True)
    print()


def suggested(models: dict[str, tuple[Any, Any]]) -> None:
    """Print what is suggested for some recipes, and what it costs on other texts."""
    print(f"The strength that `steerkit.suggest_strength` finds for a budget of {MAX_KL:g} nats per token, and what it")
    print(f"costs on {OTHERS} neutral texts that it was not measured on; the last column is in parts of the budget.\n")
    print("| recipe | model | strength | KL, its texts | KL, other texts | over the budget |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (model, tokenizer) in models.items():
        others = Setup(model, tokenizer, neutral=neutral_texts()[1::2][:OTHERS])
        for recipe in map(find_recipe, RECIPES):
            try:
                vector = recipe.extract(model, tokenizer)
                vector = replace(vector, suggested_strength=None, unit="paper", calibration={})
                own = suggest_strength(model, tokenizer, vector)
                assert own.suggested_strength is not None
                kl = cost(others, vector, own.suggested_strength)
                cells = [
                    f"{own.suggested_strength:g}",
                    f"{own.calibration['kl']:.3f}",
                    f"{kl:.3f}",
                    f"{kl / MAX_KL:.2f}",
                ]
            except SteerError as error:
                cells = [str(error), "-", "-", "-"]
            print(f"| {recipe.name} | {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print both tables as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strengths")
    parser.add_argument("--model", action="append", help="repeatable (default: smollm2-135m and gemma3-270m)")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    options = parser.parse_args()
    names = options.model or ["smollm2-135m", "gemma3-270m"]
    title = "What a strength costs"
    with recorded("strengths", title, "benchmarks.strengths", wanted=options.write, note=NOTE) as facts:
        models = {name: steerkit.load_model(name) for name in names}
        facts["model"] = next(iter(models.values()))[0]
        equal_costs(models)
        suggested(models)


if __name__ == "__main__":
    main()
