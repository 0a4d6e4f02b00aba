"""Rotation beside plain addition that moves activations as far: `python -m benchmarks.matched [VECTOR]`.

The addition is CAA's, fitted on the same items at the same sites, with the strength at which it moves a token of
neutral texts as far as the rotation does on average, in parts of the token's norm. Random planes of the same angle
stand beside both.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import steerkit
from benchmarks.results import recorded
from steerkit._support.shipped import vector_path
from steerkit.activations.recording import record_ids
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.scoring import measure
from steerkit.evaluate.setup import Setup
from steerkit.methods._registry import default_strength, method_of
from steerkit.recipe import find_recipe
from steerkit.tokens.forward_pass import Pass
from steerkit.tokens.scope import Scope
from steerkit.vector.steering_vector import SteeringVector

TEXTS, PLANES, ADDITIONS = 12, 5, 2


def displacement(setup: Setup, vector: SteeringVector, strength: float) -> float:
    """Mean over sites and answer tokens of |edited - h| / |h|, on the unsteered model's activations."""
    method, found = method_of(vector), []
    texts = [setup.render(text) for text in setup.calm[:TEXTS]]
    rows = record_ids(setup.model, [text.ids for text in texts], vector.sites)
    for site in vector.sites:
        prepared = method.prepare(vector.params(site), torch.tensor(strength), torch.float32, torch.device("cpu"))
        for text, h in zip(texts, rows[site], strict=True):
            tokens = Pass(batch=1, width=len(h), past=0, device=h.device, boundary=len(h) - 1).tokens(
                Scope.parse("all")
            )
            moved = (method.edit(h[None], prepared, tokens)[0] - h).norm(dim=-1) / h.norm(dim=-1)
            found.append(moved[text.prompt_length - 1 :])
    return float(torch.cat(found).mean())


def main() -> None:
    """Print the comparison as a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matched")
    parser.add_argument("vector", nargs="?", default="optimism-selective")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    options = parser.parse_args()
    title = "Rotation beside addition"
    with recorded("matched", title, "benchmarks.matched", wanted=options.write) as facts:
        facts["model"], facts["vectors"] = compare(options.vector)


def compare(name: str) -> tuple[Any, dict[str, str]]:
    """Print the table; the model and the vectors' digests."""
    model, tokenizer = steerkit.load_model()
    vector = SteeringVector.load(vector_path(name))
    recipe = find_recipe(str(vector.recipe))
    train, held_out = recipe.split()
    angle = default_strength(vector)
    setup = Setup(model, tokenizer, held_out, texts=12)
    addition = steerkit.fit(model, tokenizer, train, method="caa", sites=vector.sites, readout=recipe.method.readout)
    addition = addition.at(scope=vector.scope)
    reach = displacement(setup, vector, angle)
    strength = reach / displacement(setup, addition, 1.0)
    print(f"{name}: {len(vector.sites)} sites, displacement {reach:.3f} of a token's norm\n")
    print("| | strength | moved | effect | KL | ppl ratio | repetition |\n| --- | --- | --- | --- | --- | --- | --- |")
    cases = [("rotation", vector, angle), ("addition, same sites and displacement", addition, strength)]
    cases += [(f"random plane {seed}", random_like(vector, seed=seed), angle) for seed in range(1, PLANES + 1)]
    cases += [
        (f"random addition {seed}", random_like(addition, seed=seed), strength) for seed in range(1, ADDITIONS + 1)
    ]
    for title, one, strength in cases:
        is_control = title.startswith("random")
        scorers = ["preference_margin", "divergence"] + ([] if is_control else ["repetition"])
        found, moved = measure(setup.trial(one, strength), scorers), displacement(setup, one, strength)
        cells = []
        for column in ("preference_margin", "kl", "perplexity_ratio", "repetition"):
            effect = found[column].effect if column in found else None
            cells.append("-" if effect is None else f"{effect.mean:+.3f} ({effect.low:+.3f} to {effect.high:+.3f})")
        print(f"| {title} | {strength:.3g} | {moved:.3f} | {' | '.join(cells)} |", flush=True)
    return model, {name: vector.digest}


if __name__ == "__main__":
    main()
