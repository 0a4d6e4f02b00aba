"""Pictures, one file for each kind.

`curves` (effect by strength), `costs`, `scatter` (effect against cost), `separation` (two sides of the data), `maps`
(parts of the model) and `tokens`; `drawing` is what they share.
"""

from __future__ import annotations

from steerkit.report.plots.costs import Bar, Panel, costs_svg, forest_svg
from steerkit.report.plots.curves import curve_svg, plot_curve, plot_sweep
from steerkit.report.plots.drawing import (
    BLUE,
    GREY,
    LINES,
    MARKS,
    ORANGE,
    WIDTH,
    finite,
    new_figure,
    ready,
    save,
    sentence,
    style,
    svg,
)
from steerkit.report.plots.maps import plot_maps
from steerkit.report.plots.scatter import Spot, spots_svg
from steerkit.report.plots.separation import histogram_svg, separation_svg
from steerkit.report.plots.tokens import plot_tokens

__all__ = [
    "BLUE",
    "GREY",
    "LINES",
    "MARKS",
    "ORANGE",
    "WIDTH",
    "Bar",
    "Panel",
    "Spot",
    "costs_svg",
    "curve_svg",
    "finite",
    "forest_svg",
    "histogram_svg",
    "new_figure",
    "plot_curve",
    "plot_maps",
    "plot_sweep",
    "plot_tokens",
    "ready",
    "save",
    "sentence",
    "separation_svg",
    "spots_svg",
    "style",
    "svg",
]
