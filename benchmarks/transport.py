"""Activation Transport beside CAA and set-projection at one cost: `python -m benchmarks.transport --write`, resumable.

For each model and behaviour all vectors are fitted on the same pairs, brought to the same KL divergence on neutral
texts (`benchmarks.equal_kl`) and measured on held-out pairs. CAA and set-projection act at the blocks of the
behaviour's CAA recipe, at the same depth in another model; transport at the outputs of all norms.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import steerkit
from benchmarks import results
from benchmarks.equal_kl import HEAD, Row, measured
from steerkit.evaluate.setup import Setup
from steerkit.fitting.fitting import read
from steerkit.methods.transport import Transport
from steerkit.model import weights_of
from steerkit.network.decoder import find_decoder, inner_model
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.recipe import find_recipe
from steerkit.vector.steering_vector import SteeringVector

MODELS = ("smollm2-135m", "gemma3-270m")
BEHAVIOURS = ("optimism", "refusal", "formality")
KLS = (0.1, 0.3)
NEUTRAL, ITEMS, PAIRS_OUT = 6, 20, 0.5
KEPT = Path(__file__).resolve().parents[1] / "out" / "transport.jsonl"
CAA = "CAA"
TRANSPORTS: dict[str, dict[str, Any]] = {
    "transport": {},
    "transport, all at once": {"sequential": False},
}


def vectors(model: Any, tokenizer: Any, behaviour: str, train: ContrastSet) -> dict[str, SteeringVector]:
    """All vectors of one behaviour, fitted on the same pairs."""
    decoder = find_decoder(model)
    how: dict[str, Any] = {"readout": "response_mean"}
    acts = read(model, tokenizer, train, method="transport", sites=Transport().sites(decoder), **how)
    found = {
        name: steerkit.fit(model, tokenizer, train, method=Transport.from_settings(settings), acts=acts)
        for name, settings in TRANSPORTS.items()
    }
    recipe = find_recipe(f"{behaviour}-caa")
    how["layers"] = recipe.at_depth(recipe.method, decoder.num_layers).layers
    found[CAA] = steerkit.fit(model, tokenizer, train, method="caa", **how)
    settings = {"origin": "other"}
    coordinate = steerkit.fit(model, tokenizer, train, method="set_projection", settings=settings, **how)
    return {**found, "set-projection": coordinate.at(scope=found[CAA].scope)}


def measure_one(name: str, model: Any, tokenizer: Any, behaviour: str) -> None:
    """Measure one behaviour on one model, and keep the rows."""
    train, held_out = find_recipe(f"{behaviour}-caa").split()
    train, _ = train.split(held_out=PAIRS_OUT, seed=0)
    setup = Setup(model, tokenizer, held_out).first(ITEMS, NEUTRAL)
    rows = [
        row
        for title, vector in vectors(model, tokenizer, behaviour, train).items()
        for row in measured(setup, title, vector, KLS)
    ]
    entry = {"model": name, "behaviour": behaviour, "pairs": len(train), "items": ITEMS}
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    with KEPT.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**entry, "rows": [row.as_json() for row in rows]}) + "\n")
    print(f"{name}, {behaviour}: measured", file=sys.stderr, flush=True)


def kept() -> dict[tuple[str, str], dict[str, Any]]:
    """What has been measured, by model and behaviour."""
    lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else []
    return {(one["model"], one["behaviour"]): one for one in map(json.loads, lines)}


def table(entry: dict[str, Any]) -> dict[str, Any]:
    """The table of one model and behaviour, those of one KL divergence together, with the difference to CAA."""
    rows = sorted(map(Row.from_json, entry["rows"]), key=lambda row: row.kl)
    beside = {row.kl: row for row in rows if row.name == CAA}
    cells = []
    for row in rows:
        apart = None if row.name == CAA else row.beside(beside[row.kl])
        shown = "-" if apart is None else f"{apart.mean:+.3f} ({apart.low:+.3f} to {apart.high:+.3f})"
        cells.append([*row.cells(), shown])
    return {"columns": [*HEAD, "effect over CAA's"], "rows": cells}


WORDS = """Vectors of the same pairs, at the strengths at which each costs the same KL divergence from the unsteered
model on {neutral} neutral texts; effect: change of the preference margin on held-out pairs, nats per token, with 95 %
intervals; the last column is the paired difference to CAA's effect on the same items. `transport` is Linear-AcT at the
outputs of all norms, fitted site by site in the order of a pass (`target="mapped"`, as published), on all tokens; `all
at once` is the same fitted in one unsteered pass (`sequential=False`). CAA and set-projection (which counts from the
other side's mean here) act at the blocks of the behaviour's CAA recipe, on answers alone. What was not measured has no
table."""
MEANING = """What it means. Fitted all at once, transport is about as good as CAA or a little behind on SmolLM2 and
better on Gemma 3, and needs no choice of blocks. Fitted in the order of a pass, as published, its effect at the same
cost is smaller than all at once, in every table. A likely reason, not tested here: both sides are read under the
earlier maps, so the difference between them does not shrink, while what it is read from moves away from the model's
own activations. Strength 1, the whole way, is no safe strength: a KL divergence of 0.3 is spent at a quarter of it to
a little more than all of it. Set-projection is the strongest on SmolLM2; on Gemma 3 it often has no strength that
costs so little."""
TITLES = {"smollm2-135m": "SmolLM2-135M-Instruct", "gemma3-270m": "Gemma 3 270M"}


def page() -> None:
    """Write the page of what has been measured."""
    parts: list[results.Part] = [WORDS.format(neutral=NEUTRAL), MEANING]
    entries = kept()
    for name in MODELS:
        parts += [f"## {TITLES[name]}", f"`{name}`: {weights_of(inner_model(steerkit.load_model(name)[0]))}."]
        for entry in (entries[name, behaviour] for behaviour in BEHAVIOURS if (name, behaviour) in entries):
            told = f"{entry['behaviour']}: {entry['pairs']} pairs fitted on, {entry['items']} held out."
            parts += [f"{told[0].upper()}{told[1:]}", table(entry)]
    model, _ = steerkit.load_model(results.MODEL)
    title, command = "Activation Transport beside CAA", "python -m benchmarks.transport --write"
    results.write("transport", title, command, parts, model=model, measured=list(entries.values()))


def main() -> None:
    """Measure what has not been measured, and print or write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transport")
    parser.add_argument("--model", action="append", help="repeatable (default: smollm2-135m and gemma3-270m)")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of all models")
    parser.add_argument("--page", action="store_true", help="only make the page, of what has been measured")
    options = parser.parse_args()
    models = {name: steerkit.load_model(name) for name in (() if options.page else options.model or MODELS)}
    for behaviour in BEHAVIOURS:
        for name, (model, tokenizer) in models.items():
            if (name, behaviour) not in kept():
                measure_one(name, model, tokenizer, behaviour)
    for (name, behaviour), entry in kept().items():
        print(f"{name}, {behaviour}\n")
        print("\n".join(" | ".join(cells) for cells in table(entry)["rows"]), end="\n\n")
    if options.write or options.page:
        page()


if __name__ == "__main__":
    main()
