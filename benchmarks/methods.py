"""The page of all methods: `python -m benchmarks.methods FOLDER`.

FOLDER holds what `steerkit compare optimism --out FOLDER` wrote.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import steerkit
from benchmarks import results

COMMAND = "make evidence"
BEHAVIOUR = "optimism"
WORDS = """Every method calibrated on the same training items to the same budget (KL 0.3 nats per token, perplexity
ratio 1.3, repetition +0.1), then measured once on {items} held-out items. Changes against the unsteered model with 95 %
intervals; effect: preference margin in nats per token; controls: random directions and fits on shuffled labels, of the
same norm; time: decoding, over unsteered; confirmed: clear of the controls and inside the budget on the held-out items
too. A report with curves and texts lies beside this page: `methods.html`."""


def parts(comparison: dict[str, Any], table: str) -> list[results.Part]:
    """What the page says."""
    return [WORDS.format(items=comparison["items"]), *results.parts_of(table)]


def main(folder: Path) -> None:
    """Write the page, and put the report beside it."""
    comparison = json.loads((folder / f"{BEHAVIOUR}.json").read_text(encoding="utf-8"))
    table = (folder / f"{BEHAVIOUR}.md").read_text(encoding="utf-8")
    model, _ = steerkit.load_model(results.MODEL)
    shown = parts(comparison, table)
    page = results.write("methods", f"Methods on {BEHAVIOUR}", COMMAND, shown, model=model, comparison=comparison)
    shutil.copy(folder / f"{BEHAVIOUR}.html", page.with_suffix(".html"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
