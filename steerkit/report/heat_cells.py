"""The heat map of a report: every token with the colour of its projection; and estimates as cells of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from steerkit.evaluate.intervals import Estimate
from steerkit.monitor.token_heat import TokenScores
from steerkit.report.evidence import Evidence
from steerkit.report.figures_text import signed

__all__ = ["Token", "bounds_of", "cell", "given", "heat_part", "token_cells"]


class Token(NamedTuple):
    """One token of the heat map."""

    text: str
    title: str
    colour: str
    kind: str


def heat_part(evidence: Evidence) -> dict[str, Any] | None:
    """The heat map's tokens, its scale and its sentence."""
    heat = evidence.heat
    if heat is None:
        return None
    answers = torch.cat([scores.values[scores.prompt :] for scores in (heat.baseline, heat.steered)]) - heat.middle
    scale = float(answers.abs().max()) if len(answers) else 0.0
    scale = scale or 1.0
    cells = {
        name: token_cells(scores, heat.middle, scale)
        for name, scores in (("baseline", heat.baseline), ("steered", heat.steered))
    }
    means = [float(scores.values[scores.prompt :].mean()) - heat.middle for scores in (heat.baseline, heat.steered)]
    words = (
        f"Projection of every token on the direction at {heat.baseline.site}, activation units. Both texts are read by "
        f"the unsteered model, so that the colours show what the words say and not what the edit adds; zero is "
        f"half-way between the two sides of the held-out items. The unsteered answer lies at {signed(means[0])} on "
        f"average, the steered one at {signed(means[1])}. While steering, its tokens lie {signed(heat.shift)} further "
        "along. Colours of the prompt end at the same scale; its first token often lies far outside."
    )
    legend = [_colour(place / 4 - 1) for place in range(9)]
    return {
        "prompt": cells["baseline"][: heat.baseline.prompt],
        "baseline": cells["baseline"][heat.baseline.prompt :],
        "steered": cells["steered"][heat.steered.prompt :],
        "legend": legend,
        "scale": scale,
        "words": words,
    }


def token_cells(scores: TokenScores, middle: float, scale: float) -> list[Token]:
    """Each token with the colour and the number of its own value."""
    cells = []
    for text, value in zip(scores.tokens, scores.values.tolist(), strict=True):
        share = max(-1.0, min(1.0, (value - middle) / scale))
        kind = "up" if share > 0.5 else "down" if share < -0.5 else "even"
        shown = text.replace("\n", "\u21b5\n").replace("\t", "\u21e5")
        cells.append(Token(shown, f"{value - middle:+.3f}", _colour(share), kind))
    return cells


def _colour(share: float) -> str:
    """From orange (-1) over white (0) to blue (1); black text is readable on all of them."""
    end = (86, 180, 233) if share > 0 else (230, 145, 56)
    mixed = [round(255 + (one - 255) * abs(share)) for one in end]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def given(found: Mapping[str, Any] | None) -> Estimate | None:
    """Read an estimate from plain data; a missing end of its interval becomes infinite."""
    if found is None:
        return None
    low, high = found.get("low"), found.get("high")
    return Estimate(found["mean"], -math.inf if low is None else low, math.inf if high is None else high)


def cell(found: Estimate | Mapping[str, Any] | None, form: str = "+.2f") -> str:
    """A mean with its interval."""
    one = found if isinstance(found, Estimate) else given(found)
    if one is None:
        return "-"
    if not (math.isfinite(one.low) and math.isfinite(one.high)):
        return f"{one.mean:{form}} (no interval)"
    return f"{one.mean:{form}} ({one.low:{form}} to {one.high:{form}})"


def bounds_of(found: Mapping[str, Any], form: str) -> str:
    """The ends of an interval in printf's form; nothing where nothing bounds it."""
    low, high = found.get("low"), found.get("high")
    return "" if low is None or high is None else f"{form % low} to {form % high}"
