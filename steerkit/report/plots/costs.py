"""Costs over strength as small multiples, and effects of several methods below each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from steerkit.evaluate.intervals import Estimate
from steerkit.report.plots.bands import draw_band
from steerkit.report.plots.drawing import BLUE, GREY, ORANGE, WIDTH, finite, new_figure, sentence, style, svg

__all__ = ["Bar", "Panel", "costs_svg", "forest_svg"]


class Panel(NamedTuple):
    """One cost over strengths.

    Attributes:
        title: what it is.
        unit: of the numbers.
        strengths: rising.
        values: at each strength, with intervals.
        baseline: of the unsteered model; None draws no line.
    """

    title: str
    unit: str
    strengths: Sequence[float]
    values: Sequence[Estimate]
    baseline: float | None = None


class Bar(NamedTuple):
    """One line of a forest plot.

    Attributes:
        label: at the left.
        effect: with its interval; None where nothing was found.
        controls: lowest and highest of the controls; None where there are none.
        filled: whether the effect is clear of its controls.
    """

    label: str
    effect: Estimate | None
    controls: tuple[float, float] | None
    filled: bool


def costs_svg(panels: Sequence[Panel], *, unit: str = "paper", marked: float | None = None) -> str:
    """Draw costs over strengths as small multiples.

    Args:
        panels: what to draw, two beside each other.
        unit: of the strength.
        marked: a strength to mark as suggested.

    Returns:
        SVG.

    Raises:
        SteerError: matplotlib is not installed.
    """
    with style():
        rows = math.ceil(len(panels) / 2)
        figure, grid = new_figure(WIDTH, 2.3 * rows, rows=rows, columns=2, sharex=True, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            draw_band(axes, panel.strengths, panel.values, BLUE, "o")
            if panel.baseline is not None:
                axes.axhline(panel.baseline, color=GREY, linewidth=1, linestyle=":")
            if marked is not None:
                axes.axvline(marked, color=ORANGE, linewidth=1, linestyle="--", zorder=0)
            axes.set_title(sentence(panel.title), loc="left")
            axes.set_ylabel(panel.unit)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel(f"strength ({unit} unit)", fontsize=10)
        return svg(figure)


def forest_svg(bars: Sequence[Bar], *, effect: str) -> str:
    """Draw effects with intervals below each other, the controls as grey bars behind them.

    Args:
        bars: from top to bottom.
        effect: label of the x axis.

    Returns:
        SVG.

    Raises:
        SteerError: matplotlib is not installed.
    """
    with style():
        figure, axes = new_figure(WIDTH, 1.3 + 0.34 * len(bars))
        for place, bar in enumerate(bars):
            if bar.controls is not None:
                low, high = bar.controls
                label = "controls" if not any(other.controls for other in bars[:place]) else None
                axes.plot([low, high], [place, place], color="0.75", linewidth=8, solid_capstyle="butt", label=label)
            if bar.effect is None:
                axes.annotate("nothing found", (0, place), xytext=(4, 0), textcoords="offset points", va="center")
                continue
            low, high = finite(bar.effect)
            axes.plot([low, high], [place, place], color=BLUE, linewidth=2)
            face = BLUE if bar.filled else "white"
            axes.plot([bar.effect.mean], [place], color=BLUE, marker="o", markersize=7, markerfacecolor=face)
        axes.axvline(0, color=GREY, linewidth=1, linestyle=":")
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(effect)
        if any(bar.controls for bar in bars):
            figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right")
        return svg(figure)
