"""Maps of parts over layers, such as how strongly each attention head is edited."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerkit.errors import SteerError
from steerkit.methods._protocols import HeatMap
from steerkit.report.plots.drawing import BLUE, ORANGE, new_figure, save, sentence, style

__all__ = ["plot_maps"]


def plot_maps(maps: Sequence[HeatMap], path: str | Path, *, title: str, layers: int) -> Path:
    """Draw signed sizes of parts over layers: what is over 0 in blue, what is under it in orange with a black edge.

    Args:
        maps: what to draw, beside each other, each with a scale of its own.
        path: a .png, .svg or .pdf file.
        title: above the picture.
        layers: how many blocks the model has.

    Returns:
        The path written.

    Raises:
        SteerError: matplotlib is not installed, there is no map, or the file cannot be written.
    """
    if not maps:
        raise SteerError("this vector consists of no parts that could be drawn as a map; inspect it without --plot")
    with style():
        figure, grid = new_figure(
            3.8 * len(maps), max(3.4, 1.7 + 0.12 * layers), columns=len(maps), sharey=True, squeeze=False
        )
        for axes, one in zip(grid.flat, maps, strict=True):
            _draw_map(figure, axes, one, layers)
        grid.flat[0].set_ylabel("block, counted from 0")
        figure.suptitle(title, fontsize=10)
        return save(figure, Path(path))


def _draw_map(figure: Any, axes: Any, one: HeatMap, layers: int) -> None:
    """One map: rows are blocks, the first at the bottom. Parts under 0 get an edge where they are few, else a line."""
    import numpy
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    width = max(map(len, one.rows.values()))
    values = numpy.full((layers, width), numpy.nan)
    for layer, row in one.rows.items():
        values[layer, : len(row)] = row
    values[values == 0] = numpy.nan
    largest = float(numpy.nanmax(numpy.abs(values)))
    # Bright is small in both directions, but never as white as what is left alone.
    ramp = (0.0, ORANGE), (0.4999, "#f7dcc8"), (0.5001, "#cfe4f1"), (1.0, BLUE)
    colours = LinearSegmentedColormap.from_list("signed", ramp)
    edges = numpy.arange(width + 1) - 0.5, numpy.arange(layers + 1) - 0.5
    drawn = axes.pcolormesh(*edges, values, cmap=colours, vmin=-largest, vmax=largest)
    for layer, place in numpy.argwhere(values < 0):
        first = place == 0 or not values[layer, place - 1] < 0
        if width <= 64:
            axes.add_patch(
                Rectangle((place - 0.42, layer - 0.42), 0.84, 0.84, fill=False, edgecolor="black", linewidth=0.7)
            )
        elif first:
            axes.plot([place - 0.5] * 2, [layer - 0.5, layer + 0.5], color="black", linewidth=1)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(-0.5, layers - 0.5)
    axes.set_title(f"{sentence(one.title)} (black {'edge' if width <= 64 else 'mark'}: {one.below})")
    axes.set_xlabel(one.across)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(drawn, ax=axes, pad=0.02, location="bottom", aspect=30)
    bar.set_label(f"{one.below} < 0 < {one.above}")
