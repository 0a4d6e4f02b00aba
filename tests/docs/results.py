"""README's one table of results, read from the comparison that is kept as JSON."""

from __future__ import annotations

import json
from typing import Any

from steerkit.network.sites import sites_text
from tests.docs.pages import ROOT

CHOSEN = ("caa", "persona", "repe", "selective", "set_projection", "steer2edit")


def comparison() -> dict[str, Any]:
    """The kept comparison of methods on one behaviour."""
    content = json.loads((ROOT / "docs" / "results" / "methods.json").read_text(encoding="utf-8"))
    return dict(content["comparison"])


def table() -> str:
    """The table, as the figures state it."""
    lines = ["| method | where, strength | effect | controls | KL | perplexity ratio | confirmed |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    rows = {row["method"]: row for row in comparison()["rows"]}
    for name in CHOSEN:
        row = rows[name]
        effect, (low, high) = row["effect"], row["random"]
        lines.append(
            f"| `{name}` | {sites_text(row['sites'])}, {row['strength']:g} "
            f"| {effect['mean']:+.2f} ({effect['low']:+.2f} to {effect['high']:+.2f}) | {low:+.2f} to {high:+.2f} "
            f"| {row['kl']['mean']:.2f} | {row['perplexity_ratio']['mean']:.2f} | {'yes' if row['works'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"
