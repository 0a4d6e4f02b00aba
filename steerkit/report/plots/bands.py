"""Means as a line and intervals as a band, which every curve is drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steerkit.evaluate.intervals import Estimate
from steerkit.report.plots.drawing import finite

__all__ = ["draw_band"]


def draw_band(
    axes: Any,
    x: Sequence[float],
    values: Sequence[Estimate],
    colour: str,
    mark: str,
    *,
    label: str | None = None,
    band: str | None = None,
    dash: str = "-",
    alpha: float = 0.2,
) -> None:
    """Means as a line, intervals as a band; an end that no number bounds is left out."""
    ends = [finite(value) for value in values]
    lows, highs = [low for low, _ in ends], [high for _, high in ends]
    axes.fill_between(x, lows, highs, color=colour, alpha=alpha, linewidth=0, label=band)
    means = [value.mean for value in values]
    axes.plot(x, means, color=colour, linestyle=dash, linewidth=1.8, marker=mark, markersize=4.5, label=label, zorder=3)
