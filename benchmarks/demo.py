"""The page of the demo's curve: `python -m benchmarks.demo` runs `steerkit demo --full` and writes what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

import steerkit
from benchmarks import results
from steerkit.vector.steering_vector import SteeringVector

COMMAND = "steerkit demo --full"
COLUMNS = ["strength", "margin", "95 % interval", "five random directions, same norm"]
WORDS = """`steerkit demo --full` (SmolLM2-135M-Instruct, recipe `{recipe}`, {items} held-out items, preference margin
in nats per token: how much more likely the model finds the optimistic answer than the pessimistic one):"""
SAID = """Rises over the whole range: {rises}; outer intervals clear of random directions: {clear}. Every shipped vector
has the same table on its card (`vectors/smollm2-135m/*.md`), the weaker ones too."""


def found(out: str) -> dict[str, Any]:
    """What the command prints as JSON."""
    command = [sys.executable, "-m", *COMMAND.split(), "--json", "--out", out]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return answer


def line(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    spans = [(row["low"], row["high"]), (min(row["random"]), max(row["random"]))]
    return [
        f"{row['strength']:+g}" if row["strength"] else "0",
        f"{row['effect']:+.3f}",
        *(f"{low:+.2f} to {high:+.2f}" for low, high in spans),
    ]


def main() -> None:
    """Write the page."""
    with tempfile.TemporaryDirectory(prefix="steerkit-") as out:
        measured = found(out)
    rises, clear = ("yes" if measured[key] else "no" for key in ("rises", "clear_of_controls"))
    parts: list[results.Part] = [
        WORDS.format(recipe=measured["recipe"], items=measured["items"]),
        {"columns": COLUMNS, "rows": [line(row) for row in measured["curve"]]},
        SAID.format(rises=rises, clear=clear),
    ]
    model, _ = steerkit.load_model()
    vectors = {measured["recipe"]: SteeringVector.load(measured["recipe"]).digest}
    results.write("demo", "The demo's curve", COMMAND, parts, model=model, vectors=vectors)


if __name__ == "__main__":
    main()
