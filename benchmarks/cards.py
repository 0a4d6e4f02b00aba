"""The cards of the shipped vectors: `python -m benchmarks.cards [--check] [--no-answers]`.

A card is made of the vector's file, of `evidence.json` beside it (what `steerkit evidence` measured on generated text)
and of `cards.json`: the answers before and after, and for gates what either kind of prompts got. So writing all of them
takes no model and no minute; only a vector whose answers are missing or of another file is answered anew first.
`--check` writes nothing and names every card that is stale or was edited by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import steerkit
from steerkit._support.shipped import traits
from steerkit.evaluate.by_prompt_kind import Kind, by_kind
from steerkit.evaluate.setup import Setup
from steerkit.methods._registry import example_strength, is_gated
from steerkit.model import weights_of
from steerkit.network.decoder import inner_model
from steerkit.persona.card_text import trait_text
from steerkit.persona.traits import TraitSpec
from steerkit.recipe import find_recipe
from steerkit.report.card import Answer, vector_card
from steerkit.vector.steering_vector import SteeringVector

FOLDER = Path(__file__).resolve().parents[1] / "vectors" / "smollm2-135m"
MODEL = "smollm2-135m"
NEW_TOKENS, KIND, QUESTIONS = 40, 60, 2
Facts = dict[str, Any]


def vectors(folder: Path) -> dict[str, SteeringVector]:
    """The vectors that have a card: all but those to watch with."""
    files = sorted(folder.glob("*.safetensors"))
    return {file.stem: SteeringVector.load(file) for file in files if not file.stem.endswith("-monitor")}


def read(file: Path) -> Facts:
    """A JSON object; empty where there is no file."""
    found: Facts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def strength_of(vector: SteeringVector) -> float:
    """What answers are shown at: the suggested strength, else the one that calibration tried and could not confirm."""
    tried = (vector.held_out.get("calibration") or {}).get("strength")
    return tried if vector.suggested_strength is None and tried is not None else example_strength(vector)


def asked(name: str, vector: SteeringVector) -> list[str]:
    """The questions of the vector's recipe or trait."""
    if "persona" in vector.extra:
        return list(trait_of(vector).held_out_questions[-QUESTIONS:])
    return list(find_recipe(vector.recipe or name).evaluate.questions)


def trait_of(vector: SteeringVector) -> TraitSpec:
    """The specification of a persona vector's trait."""
    return TraitSpec.load(traits()[vector.extra["persona"]["trait"]])


def measured(model: Any, tokenizer: Any, name: str, vector: SteeringVector) -> Facts:
    """Answers before and after, and for a gate what either kind of prompts got."""
    own, gated = strength_of(vector), is_gated(vector)
    shown = (0.0, own) if gated else (-own, 0.0, own)
    rows = [(question, strength) for question in asked(name, vector) for strength in shown]
    texts = steerkit.generate(
        model,
        tokenizer,
        [question for question, _ in rows],
        vector=vector,
        strength=[strength for _, strength in rows],
        max_new_tokens=NEW_TOKENS,
    )
    found: Facts = {
        "digest": vector.digest,
        "answers": [[*row, text] for row, text in zip(rows, texts, strict=True)],
    }
    if gated:
        setup = Setup(model, tokenizer, find_recipe(vector.recipe or name).split()[1], texts=KIND)
        kinds = by_kind(replace(setup, max_new_tokens=NEW_TOKENS), vector, own)
        found["kinds"] = [kind.as_json() for kind in kinds]
    return found


def card(name: str, vector: SteeringVector, kept: Facts, evidence: Facts, folder: Path) -> str:
    """The text of one card."""
    own = kept["vectors"].get(name, {})
    text = vector_card(
        name,
        vector,
        kinds=[Kind.from_json(one) for one in own.get("kinds", ())],
        answers=[Answer(*one) for one in own.get("answers", ())],
        new_tokens=NEW_TOKENS,
        weights=kept["weights"],
        entry=evidence.get("vectors", {}).get(name),
    )
    if "persona" in vector.extra:
        monitor = name.removesuffix("-persona") + "-monitor.safetensors"
        text += trait_text(trait_of(vector), vector, monitor, SteeringVector.load(folder / monitor))
    return text


def stale(folder: Path) -> list[str]:
    """What is wrong with the cards of a folder, a line each."""
    kept, evidence = read(folder / "cards.json"), read(folder / "evidence.json")
    found, known = [], vectors(folder)
    for name, vector in known.items():
        file = folder / f"{name}.md"
        if kept["vectors"].get(name, {}).get("digest") != vector.digest:
            found.append(f"{file.name}: its answers are of another vector than {name}.safetensors")
        elif not file.exists() or file.read_text(encoding="utf-8") != card(name, vector, kept, evidence, folder):
            found.append(f"{file.name}: not what its vector, evidence.json and cards.json say")
    return found + [f"{file.name}: no vector" for file in sorted(folder.glob("*.md")) if file.stem not in known]


def write(folder: Path, *, answers: bool) -> None:
    """Measure what is missing, and write every card; without answers, cards say nothing of what was not measured."""
    kept = {"vectors": {}, **read(folder / "cards.json")}
    known = vectors(folder)
    for name, one in known.items():
        if kept["vectors"].get(name, {}).get("digest") != one.digest:
            kept["vectors"][name] = {"digest": one.digest}
    missing = [name for name in known if "answers" not in kept["vectors"][name]]
    if missing and answers:
        model, tokenizer = steerkit.load_model(MODEL)
        kept["weights"] = str(weights_of(inner_model(model)))
        for name in missing:
            print(f"answering with {name}", file=sys.stderr, flush=True)
            kept["vectors"][name] = measured(model, tokenizer, name, known[name])
    kept["vectors"] = {name: kept["vectors"][name] for name in known}
    text = json.dumps(kept, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "cards.json").write_text(f"{text}\n", encoding="utf-8")
    evidence = read(folder / "evidence.json")
    for name, vector in known.items():
        (folder / f"{name}.md").write_text(card(name, vector, kept, evidence, folder), encoding="utf-8")


def main() -> None:
    """Write the cards, or check them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cards")
    parser.add_argument("--check", action="store_true", help="write nothing; name what is stale, and fail")
    parser.add_argument("--no-answers", action="store_true", help="answer nothing anew: no model, a second")
    options = parser.parse_args()
    if not options.check:
        write(FOLDER, answers=not options.no_answers)
    found = stale(FOLDER)
    print("\n".join(found) if found else f"{len(vectors(FOLDER))} cards are what their vectors say")
    if found:
        print("make them anew: python -m benchmarks.cards")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
