"""The shipped vectors, made anew: `python -m benchmarks.vectors [RECIPE]...`, resumable, some minutes each.

Every recipe of pairs is fitted as it stands, and its strength found at its own sites: chosen on a part of the training
items inside the usual budget, confirmed or not on the held-out ones (see `steerkit.evaluate.calibration`). The file
keeps all of that. The recipe's `[apply]` follows: the strength, or `no_effect` where none was confirmed. Recipes of two
kinds of prompts have no pairs to calibrate on; `benchmarks.gates` measures them. Cards: `python -m benchmarks.cards`.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import steerkit
from benchmarks import results
from steerkit._support.shipped import recipes
from steerkit.evaluate.calibration import Calibration, Search
from steerkit.evaluate.calibration.problem import strength_of
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store import Store
from steerkit.network.sites import sites_text
from steerkit.recipe import Recipe
from steerkit.vector.steering_vector import SteeringVector

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "vectors" / "smollm2-135m"
KEPT = ROOT / "out" / "vectors"
NEUTRAL, TEXTS, CONTROLS = 40, 8, 3


def calibrated(recipe: Recipe, model: Any, tokenizer: Any) -> Calibration:
    """The strength of a recipe's vector at its own sites; a weaker one where it costs more on other texts."""
    found = at_strengths(recipe, model, tokenizer)
    while found.has_effect and found.strength is not None and found.budget.breaks(found.confirmed):
        tried = {strength for point in found.points if abs(strength := strength_of(point)) < abs(found.strength)}
        if not tried:
            break
        print(f"{recipe.name}: {found.strength:g}: {found.verdict}; weaker", file=sys.stderr, flush=True)
        found = at_strengths(recipe, model, tokenizer, sorted(tried, key=abs))
    return found


def at_strengths(recipe: Recipe, model: Any, tokenizer: Any, strengths: Sequence[float] | None = None) -> Calibration:
    """The best of some strengths, else of the method's ladder."""
    train, held_out = recipe.split()
    part, setup = recipe.method, Setup(model, tokenizer, held_out, texts=TEXTS).first_neutral(NEUTRAL)
    return recipe.calibrate(
        setup,
        train,
        part,
        search=Search(
            candidates=[part.layers or tuple(range(setup.decoder.num_layers))], strengths=strengths, controls=CONTROLS
        ),
        store=Store(KEPT / f"{recipe.name}.rows.jsonl"),
        step=lambda words: print(f"{recipe.name}: {words}", file=sys.stderr, flush=True),
    )


def shipped(recipe: Recipe, found: Calibration, model: Any, tokenizer: Any) -> SteeringVector:
    """The vector as it ships: what the recipe extracts, with what its calibration found."""
    strength = found.strength if found.has_effect else None
    signed = replace(recipe, apply=replace(recipe.apply, strength=strength, no_effect=strength is None))
    if found.vector is not None:
        return replace(signed.signed(found.vector, recipe.method), suggested_strength=strength)
    vector = signed.extract(model, tokenizer)
    facts: dict[str, Any] = {"by": "calibrate", "confirmed": False, "verdict": found.verdict}
    return replace(vector, calibration=facts, held_out={**vector.held_out, "calibration": found.as_json()})


def is_same(vector: SteeringVector, file: Path) -> str:
    """Whether the tensors are those of the file that is there."""
    if not file.exists():
        return "new"
    old = SteeringVector.load(file)
    same = old.sites == vector.sites and all(
        torch.equal(vector.tensors[name], one) for name, one in old.tensors.items()
    )
    return "same tensors" if same else "OTHER TENSORS"


def written(recipe: Recipe, vector: SteeringVector) -> None:
    """Write the vector, and its strength into the recipe."""
    strength = vector.suggested_strength
    line = "no_effect = true" if strength is None else f"strength = {strength!r}"
    text = recipe.source.read_text(encoding="utf-8")
    text = re.sub(r"^(strength = .*|no_effect = true)$", line, text, count=1, flags=re.MULTILINE)
    if strength is None:
        text = text.replace("default = true\n", "")
    recipe.source.write_text(text, encoding="utf-8")
    vector.save(FOLDER / f"{recipe.name}.safetensors")


WORDS = """Every shipped vector of pairs at its own sites, as its file says (`python -m benchmarks.vectors` makes them
anew, some minutes each): the strength with the largest effect inside the budget (KL 0.3 nats per token, perplexity
ratio 1.3, repetition +0.1), chosen on a part of the training items, then measured once on the held-out ones. Effect:
change of the preference margin in nats per token; costs on texts that nothing was chosen on; an effect is confirmed
where its interval is clear of random directions and of fits on shuffled labels, and the costs are inside the budget.
Where a strength costs more than the budget on those texts, the next weaker one is measured there instead. Where no
effect is clear, the file suggests no strength."""


def page(model: Any) -> None:
    """Write `docs/results/calibration.md` from the files."""
    rows, digests = [], {}
    for name, file in ((name, FOLDER / f"{name}.safetensors") for name in recipes()):
        vector = SteeringVector.load(file)
        found = vector.held_out.get("calibration")
        if not found:
            continue
        digests[name], told = vector.digest, found["confirmation"]
        strength = "-" if vector.suggested_strength is None else f"{vector.suggested_strength:g}"
        effect = told.get(found["effect"], {})
        rows.append(
            [
                f"`{name}`",
                sites_text(tuple(map(str, vector.sites))),
                strength,
                _cell(effect, "change", "+.2f"),
                _cell(told.get("kl", {}), "mean", ".3f"),
                _cell(told.get("perplexity_ratio", {}), "mean", ".2f"),
                _cell(told.get("repetition", {}), "change", "+.2f"),
                "yes" if found["works"] else f"no: {found['verdict'].partition(': ')[2] or found['verdict']}",
            ]
        )
    columns = ["recipe", "sites", "strength", "effect", "KL", "ppl ratio", "repetition", "confirmed"]
    parts = [WORDS, {"columns": columns, "rows": rows}]
    title, command = "Calibrating the shipped vectors", "python -m benchmarks.vectors"
    results.write("calibration", title, command, parts, model=model, vectors=digests)


def _cell(row: Mapping[str, Any], name: str, form: str) -> str:
    """A figure with its interval."""
    if name not in row:
        return "-"
    low, high = (row[f"{name}_{end}" if name == "change" else end] for end in ("low", "high"))
    ends = "" if low is None or high is None else f" ({low:{form}} to {high:{form}})"
    return f"{row[name]:{form}}{ends}"


def main() -> None:
    """Make the vectors of the recipes asked for, else of all that have pairs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vectors")
    parser.add_argument("recipe", nargs="*", help="names (default: every recipe of pairs)")
    parser.add_argument("--page", action="store_true", help="only write the page of what the files hold")
    options = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    model, tokenizer = steerkit.load_model()
    for recipe in [] if options.page else [Recipe.load(recipes()[name]) for name in options.recipe or recipes()]:
        if recipe.data.positive is not None:
            print(f"{recipe.name}: two kinds of prompts, see benchmarks.gates")
            continue
        started = time.monotonic()
        found = calibrated(recipe, model, tokenizer)
        vector = shipped(recipe, found, model, tokenizer)
        same = is_same(vector, FOLDER / f"{recipe.name}.safetensors")
        written(recipe, vector)
        print(
            f"{recipe.name} ({time.monotonic() - started:.0f} s): {same}, {found.strength}: {found.verdict}", flush=True
        )
    page(model)


if __name__ == "__main__":
    main()
