"""The page of all methods: `python -m benchmarks.methods FOLDER...`, one folder a model.

Each folder holds what `steerkit compare optimism --model MODEL --out FOLDER` wrote. The page's JSON keeps the
comparisons whole, by model; README's table is read from there.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import steerkit
from benchmarks import results
from benchmarks.evidence import TITLES
from steerkit.model import weights_of

COMMAND = "make evidence"
BEHAVIOUR = "optimism"
WORDS = """Every method calibrated on the same training items to the same budget (KL 0.3 nats per token, perplexity
ratio 1.3, repetition +0.1), then measured once on {items} held-out items. Changes against the unsteered model with 95 %
intervals; effect: preference margin in nats per token; controls: random directions and fits on shuffled labels, of the
same norm; time: decoding, over unsteered; confirmed: clear of the controls and inside the budget on the held-out items
too."""
ASKING = """`prompting` is the unsteered model under a system prompt that asks for the behaviour, in the wording that is
best on the training items, at its own costs; below it stand the best method turned down to about the KL of asking, and
that method on top of the system prompt."""


def section(comparison: dict[str, Any], table: str, report: str) -> list[results.Part]:
    """What the page says of one model."""
    name = comparison["model"]
    model, _ = steerkit.load_model(name)
    return [
        f"## {TITLES.get(name, name)}",
        f"`{name}`: {weights_of(model)}. `{comparison['command']}` at commit `{comparison['commit']}`. "
        f"With curves and texts: `{report}`, beside this page.",
        *results.parts_of(table),
    ]


def main(folders: Sequence[Path], target: Path = results.FOLDER) -> None:
    """Write the page, and put the reports beside it."""
    comparisons = [json.loads((folder / f"{BEHAVIOUR}.json").read_text(encoding="utf-8")) for folder in folders]
    shown: list[results.Part] = [WORDS.format(items=comparisons[0]["items"]), ASKING]
    for folder, comparison in zip(folders, comparisons, strict=True):
        report = f"methods-{comparison['model']}.html"
        shown += section(comparison, (folder / f"{BEHAVIOUR}.md").read_text(encoding="utf-8"), report)
        shutil.copy(folder / f"{BEHAVIOUR}.html", target / report)
    model, _ = steerkit.load_model(results.MODEL)
    kept = {comparison["model"]: comparison for comparison in comparisons}
    title = f"Methods on {BEHAVIOUR}"
    results.write("methods", title, COMMAND, shown, model=model, comparisons=kept, folder=target)


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
