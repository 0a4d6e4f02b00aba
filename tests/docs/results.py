"""README's one table of results, read from the comparisons that are kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from steerkit.network.sites import sites_text
from tests.docs.pages import ROOT

CHOSEN = ("caa", "persona", "repe", "selective", "set_projection", "steer2edit", "prompting")
BESIDE = {", prompting's KL": "best method at prompting's KL", " + prompting": "best method + prompting"}
TITLES = {"smollm2-135m": "SmolLM2", "gemma3-270m": "Gemma 3"}


def comparisons() -> dict[str, Any]:
    """The kept comparisons of methods on one behaviour, by model."""
    content = json.loads((ROOT / "docs" / "results" / "methods.json").read_text(encoding="utf-8"))
    return dict(content["comparisons"])


def label(method: str) -> str:
    """What README calls a row; empty where it leaves the row out."""
    if method in CHOSEN:
        return f"`{method}`"
    return next((told for end, told in BESIDE.items() if method.endswith(end)), "")


def cells(row: Mapping[str, Any]) -> list[str]:
    """What one model's columns say of a row."""
    effect = row["effect"]
    if effect is None:
        return ["nothing found", "-", "-", "no"]
    place = f"{sites_text(row['sites'])}, {row['strength']:g}" if row["strength"] is not None else "system prompt"
    return [
        place,
        f"{effect['mean']:+.2f} ({effect['low']:+.2f} to {effect['high']:+.2f})",
        f"{row['kl']['mean']:.2f}",
        "yes" if row["works"] else "no",
    ]


def table() -> str:
    """The table, as the figures state it."""
    found = comparisons()
    by_model = [{label(row["method"]): cells(row) for row in one["rows"]} for one in found.values()]
    columns = ["method"]
    for model in found:
        columns += [f"{TITLES[model]}: where, strength", "effect", "KL", "confirmed"]
    names = dict.fromkeys(name for told in by_model for name in told if name)
    rows = [[name, *(cell for told in by_model for cell in told.get(name, ["-"] * 4))] for name in names]
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, ["---"] * len(columns), *rows))
