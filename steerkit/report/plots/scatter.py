"""TODO report.plots.scatter."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from steerkit.report.plots.style import BLUE, GREY, LINES, MARKS, ORANGE, WIDTH, new_figure, style, svg

__all__ = ["Spot", "histogram_svg", "separation_svg", "spots_svg"]


class Spot(NamedTuple):
    """One place of a scatter of effect against cost.

    Attributes:
        label: beside it; empty for none.
        cost: on the x axis.
        effect: on the y axis.
        kind: index of its colour and mark.
        chosen: drawn with a ring.
    """

    label: str
    cost: float
    effect: float
    kind: int = 0
    chosen: bool = False


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


def spots_svg(
    spots: Sequence[Spot],
    *,
    kinds: Sequence[str],
    effect: str,
    cost: str,
    front: Sequence[tuple[float, float]] = (),
) -> str:
    """Draw effects against costs.

    Args:
        spots: the points.
        kinds: names of the kinds, for the legend; empty for none.
        effect: label of the y axis.
        cost: label of the x axis.
        front: (cost, effect) of the points that no other point beats in both, drawn as steps.

    Returns:
        SVG.

    Raises:
        SteerError: matplotlib is not installed.
    """
    with style():
        figure, axes = new_figure(WIDTH, 4.2)
        if front:
            line = sorted(front)
            axes.step(*zip(*line, strict=True), where="post", color=GREY, linewidth=1.2, label="front", zorder=1)
        for number in sorted({spot.kind for spot in spots}):
            own = [spot for spot in spots if spot.kind == number]
            axes.plot(
                [spot.cost for spot in own],
                [spot.effect for spot in own],
                linestyle="",
                marker=MARKS[number % len(MARKS)],
                markersize=6,
                color=LINES[number % len(LINES)],
                label=kinds[number] if kinds else None,
            )
        chosen = [spot for spot in spots if spot.chosen]
        if chosen:
            axes.plot(
                [spot.cost for spot in chosen],
                [spot.effect for spot in chosen],
                linestyle="",
                marker="o",
                markersize=13,
                markerfacecolor="none",
                color="black",
                label="suggested",
            )
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axes.set_xlabel(cost)
        axes.set_ylabel(effect)
        axes.margins(0.08)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside upper center", ncols=2)
        _write_labels(figure, axes, spots, front)
        return svg(figure)


def _write_labels(figure: Any, axes: Any, spots: Sequence[Spot], front: Sequence[tuple[float, float]]) -> None:
    """Write labels beside their spots, each where it covers no spot, no other label and not the front."""
    labelled = [spot for spot in spots if spot.label]
    if not labelled:
        return
    from matplotlib.text import Text

    figure.draw_without_rendering()  # the layout decides where the spots are
    figure.set_layout_engine("none")
    taken = [_box(axes, spot) for spot in spots] + _lines(axes, sorted(front))
    frame = axes.get_window_extent()
    steps = [(step * x, step * y) for step in (7, 16, 26, 38, 52, 68, 86) for x, y in _AROUND]
    for spot in labelled:
        for x, y in steps:
            note = axes.annotate(
                spot.label,
                (spot.cost, spot.effect),
                xytext=(x, y),
                textcoords="offset points",
                fontsize=8.5,
                ha="left" if x > 0 else "right" if x < 0 else "center",
                va="bottom" if y > 0 else "top" if y < 0 else "center",
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6} if abs(x) + abs(y) > 20 else None,
            )
            note.get_window_extent()  # puts the text in its place
            box = Text.get_window_extent(note)  # without the arrow
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()  # no place at all: better no label than one that cannot be read


# Above at the left first: fronts run to the right and upwards.
_AROUND = ((-0.7, 0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, -0.7), (0, 1), (0, -1), (1, 0), (-1, 0))


def _box(axes: Any, spot: Spot) -> Any:
    """What a spot covers, in pixels."""
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform((spot.cost, spot.effect))
    size = (8 if spot.chosen else 4) * axes.figure.dpi / 72
    return Bbox.from_extents(x - size, y - size, x + size, y + size)


def _lines(axes: Any, front: Sequence[tuple[float, float]]) -> list[Any]:
    """What the steps of a front cover, in pixels: first to the right, then up."""
    from matplotlib.transforms import Bbox

    places = [axes.transData.transform(place) for place in front]
    found = []
    for (x, y), (next_x, next_y) in pairwise(places):
        found += [Bbox.from_extents(x, y - 1, next_x, y + 1), Bbox.from_extents(next_x - 1, y, next_x + 1, next_y)]
    return found
