"""A scatter of effect against cost, with the points that no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from steerkit.report.plots.drawing import GREY, LINES, MARKS, WIDTH, new_figure, style, svg

__all__ = ["Spot", "spots_svg"]


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
