"""The shipped traits, steered both ways and monitored: `python -m benchmarks.traits FOLDER [TRAIT]...`.

FOLDER holds what `steerkit persona extract TRAIT --out FOLDER/TRAIT` wrote; under `--monitor` it may be the folder of
the shipped vectors. Steering: preference margin of held-out pairs (of the questions that layer and strength were not
chosen on) at minus the strength, 0 and the strength, beside random directions of the same norm. Monitoring: how well
the last prompt token's projection on the vector to watch with tells held-out questions under held-out system prompts of
the trait from the same questions under neutral and under opposite ones, beside the vector to steer with at its own
block.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import steerkit
from benchmarks.results import recorded
from steerkit._support.shipped import traits
from steerkit.evaluate.curve import Curve, strength_response
from steerkit.evaluate.setup import Setup
from steerkit.methods._registry import default_strength
from steerkit.persona.traits import TraitSpec
from steerkit.persona.watching import Kind, separates
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

CONTROLS = 3
WHERE_NONE = 4.0
"""Strength where the extraction suggests none."""


def confirming(path: Path) -> ContrastSet:
    """The held-out pairs of odd questions: `steerkit.persona` chooses on the even ones."""
    data = ContrastSet.from_jsonl(path)
    numbers = [int(line.split('"question-')[1].split("-")[0]) for line in path.read_text("utf-8").splitlines()]
    kept = [place for place, held in enumerate(data.marks) if held and numbers[place] % 2]
    positive, negative = (tuple(side[place] for place in kept) for side in (data.positive, data.negative))
    return ContrastSet(positive, negative, paired=True)


def end(curve: Curve, place: int) -> str:
    """What the margin gained at one end of the curve, and what random directions gave."""
    found, unsteered = curve.points[place][curve.effect].effect, curve.effects[1].mean
    randoms = [control[curve.strengths[place]] - unsteered for control in curve.controls]
    span = f"{min(randoms):+.2f} to {max(randoms):+.2f}"
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f}), random {span}"


def row(model: Any, tokenizer: Any, trait: str, folder: Path) -> str:
    """One line of the table."""
    vector = SteeringVector.load(folder / f"{trait}-persona.safetensors")
    strength = default_strength(vector) if vector.suggested_strength is not None else WHERE_NONE
    setup = Setup(model, tokenizer, confirming(folder / "pairs.jsonl"))
    curve = strength_response(setup, vector, (-strength, 0.0, strength), controls=CONTROLS)
    ends = [end(curve, place) for place in (0, -1)]
    cells = [
        f"`{trait}`",
        ", ".join(map(str, vector.sites)),
        f"{strength:g}" + ("" if vector.suggested_strength is not None else " (not confirmed)"),
        str(curve.items),
        *ends,
        "yes" if curve.rises and curve.clear_of_controls else "no",
    ]
    return f"| {' | '.join(cells)} |"


def monitored(model: Any, tokenizer: Any, trait: str, folder: Path) -> str:
    """One line of the second table."""
    spec = TraitSpec.load(traits()[trait])
    watching, steering = (
        SteeringVector.load(folder / f"{trait}-{kind}.safetensors") for kind in ("monitor", "persona")
    )
    cells = [f"`{trait}`", str(watching.sites[0])]
    pairs: list[tuple[SteeringVector, Kind]] = [(watching, "neutral"), (watching, "negative"), (steering, "neutral")]
    for vector, other in pairs:
        area = separates(steerkit.Monitor(model, tokenizer, vector), spec, other)
        cells.append(f"{area.mean:.2f} ({area.low:.2f} to {area.high:.2f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traits")
    parser.add_argument("folder", type=Path)
    parser.add_argument("traits", nargs="*")
    parser.add_argument("--monitor", action="store_true", help="the second table only")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    options = parser.parse_args()
    model, tokenizer = steerkit.load_model()
    title = "The shipped traits, steered and watched"
    with recorded("traits", title, "benchmarks.traits", wanted=options.write, model=model):
        chosen = options.traits or sorted(traits())
        if not options.monitor:
            print("| trait | site | strength | pairs | margin down | margin up | both ways, clear |")
            print("| --- | --- | --- | --- | --- | --- | --- |")
            for trait in chosen:
                print(row(model, tokenizer, trait, options.folder / trait), flush=True)
            print()
        print("| trait | site | from neutral ones | from the opposite | steering vector, from neutral ones |")
        print("| --- | --- | --- | --- | --- |")
        for trait in chosen:
            own = options.folder / trait
            print(monitored(model, tokenizer, trait, own if own.is_dir() else options.folder), flush=True)


if __name__ == "__main__":
    main()
