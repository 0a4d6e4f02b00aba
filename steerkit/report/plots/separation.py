"""How far two sides lie apart: by block, and as histograms of projections."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from steerkit.evaluate.blocks import BlockEffect, Separation
from steerkit.report.plots.bands import draw_band
from steerkit.report.plots.drawing import BLUE, GREY, ORANGE, WIDTH, new_figure, save, style, svg

__all__ = ["histogram_svg", "plot_blocks", "separation_svg"]


def separation_svg(
    auc: Mapping[int, float], distance: Mapping[int, float], own: Collection[int], *, title: str = ""
) -> str:
    """Draw how well a direction separates held-out items, block by block.

    Args:
        auc: block to area under the curve.
        distance: block to Cohen's d.
        own: blocks the vector acts at, marked.
        title: above the picture.

    Returns:
        SVG.

    Raises:
        SteerError: matplotlib is not installed.
    """
    with style():
        from matplotlib.ticker import MaxNLocator

        figure, (upper, lower) = new_figure(WIDTH, 4.2, rows=2, sharex=True)
        for axes, values, name in ((upper, auc, "held-out AUC"), (lower, distance, "Cohen's d\n(pooled SDs)")):
            axes.plot(list(values), list(values.values()), color=BLUE, marker="o", markersize=3.5, linewidth=1.5)
            marked = [block for block in values if block in own]
            for block in marked:
                axes.axvline(block, color=ORANGE, linewidth=1, linestyle="--", zorder=0)
            axes.plot(
                marked,
                [values[block] for block in marked],
                color=ORANGE,
                marker="D",
                linestyle="",
                markersize=6,
                label="the vector's own blocks",
            )
            axes.set_ylabel(name)
        upper.axhline(0.5, color=GREY, linewidth=1, linestyle=":", label="chance")
        upper.set_ylim(top=1.02)
        lower.axhline(0, color=GREY, linewidth=1, linestyle=":")
        lower.set_xlabel("block, counted from 0")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        upper.set_title(title)
        figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return svg(figure)


def histogram_svg(positive: Sequence[float], negative: Sequence[float], *, label: str) -> str:
    """Draw the projections of both sides.

    Args:
        positive: one number per item.
        negative: one number per item.
        label: of the x axis.

    Returns:
        SVG.

    Raises:
        SteerError: matplotlib is not installed.
    """
    with style():
        from matplotlib.ticker import MaxNLocator

        figure, axes = new_figure(WIDTH, 3.2)
        low, high = min(*positive, *negative), max(*positive, *negative)
        count = max(8, min(24, round(1.5 * math.sqrt(len(positive) + len(negative)))))
        width = (high - low) / count or 1.0
        edges = [low + width * place for place in range(count + 1)]
        # The hatched side has a face without transparency: SVG patterns know none.
        for values, colour, face, hatch, name in (
            (negative, ORANGE, "#f6dccb", "////", "negative side"),
            (positive, BLUE, (BLUE, 0.35), "", "positive side"),
        ):
            named = f"{name}, {len(values)} items"
            _, _, patches = axes.hist(values, bins=edges, histtype="stepfilled", linewidth=1.5, label=named)
            for patch in patches:
                patch.set(facecolor=face, edgecolor=colour, hatch=hatch)
            axes.axvline(sum(values) / len(values), color=colour, linestyle="--", linewidth=1.5)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(label)
        axes.set_ylabel("items")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        return svg(figure)


def plot_blocks(
    apart: Sequence[Separation], does: Sequence[BlockEffect], best: int, path: str | Path, *, title: str = ""
) -> Path:
    """Draw by block how far the sides lie apart and, where that was measured, what steering does at an equal cost.

    Args:
        apart: separation of held-out items.
        does: effects, or none.
        best: the block to mark.
        path: a .png, .svg or .pdf file.
        title: above the picture.

    Returns:
        The path.

    Raises:
        SteerError: matplotlib is not installed, or the picture cannot be written.
    """
    with style():
        from matplotlib.ticker import MaxNLocator

        rows = 3 if does else 2
        figure, axes = new_figure(WIDTH, 1.4 + 1.5 * rows, rows=rows, sharex=True)
        blocks = [one.layer for one in apart]
        axes[0].plot(blocks, [one.auc for one in apart], color=BLUE, marker="o", markersize=3.5, linewidth=1.5)
        axes[0].axhline(0.5, color=GREY, linewidth=1, linestyle=":")
        axes[0].set_ylabel("held-out AUC")
        axes[1].plot(blocks, [one.cohens_d for one in apart], color=BLUE, marker="o", markersize=3.5, linewidth=1.5)
        axes[1].set_ylabel("Cohen's d")
        if does:
            draw_band(
                axes[2], [one.layer for one in does], [one.effect for one in does], BLUE, "o", label="", band="95 %"
            )
            axes[2].axhline(0, color=GREY, linewidth=1, linestyle=":")
            axes[2].set_ylabel("margin at\nequal cost")
        for panel in axes:
            panel.axvline(best, color=ORANGE, linewidth=1, linestyle="--", zorder=0)
        axes[-1].set_xlabel("block, counted from 0 (dashed: best separation)")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0].set_title(title)
        return save(figure, Path(path))
