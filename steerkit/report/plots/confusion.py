"""Which traits a vector moves beside its own: a map of vectors by traits, with a number in every cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerkit.errors import SteerError
from steerkit.evaluate.intervals import Estimate
from steerkit.report.plots.drawing import BLUE, ORANGE, new_figure, save, style

__all__ = ["plot_confusion"]

_LARGEST = 0.6


def plot_confusion(
    moves: Mapping[str, Mapping[str, Estimate]], own: Mapping[str, str], path: str | Path, *, title: str
) -> Path:
    """Draw how far each vector moves the score of each trait: up in blue, down in orange, nothing white.

    A number in bold is one whose interval is clear of 0; the vector's own trait has a black frame. The picture brings a
    white ground of its own, so that it can be read on a dark page too.

    Args:
        moves: by vector and trait, the mean change with its interval; every vector has the same traits.
        own: the trait of each vector.
        path: a .png, .svg or .pdf file.
        title: above the picture.

    Returns:
        The path written.

    Raises:
        SteerError: matplotlib is not installed, there is nothing to draw, or the file cannot be written.
    """
    if not moves or not all(moves.values()):
        raise SteerError("there is no vector whose answers were measured; nothing is drawn")
    traits = list(next(iter(moves.values())))
    with style():
        figure, axes = new_figure(2.3 + 0.52 * len(traits), 1.9 + 0.27 * len(moves))
        _draw(axes, moves, own, traits)
        axes.set_title(title, loc="right")
        return save(figure, Path(path))


def _draw(axes: Any, moves: Mapping[str, Mapping[str, Estimate]], own: Mapping[str, str], traits: list[str]) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    ramp = LinearSegmentedColormap.from_list("signed", [(0.0, ORANGE), (0.5, "#ffffff"), (1.0, BLUE)])
    values = [[row[trait].mean for trait in traits] for row in moves.values()]
    axes.imshow(values, cmap=ramp, vmin=-_LARGEST, vmax=_LARGEST, aspect="auto")
    for line, (name, row) in enumerate(moves.items()):
        for place, trait in enumerate(traits):
            found = row[trait]
            is_clear = found.low > 0 or found.high < 0
            axes.text(
                place,
                line,
                f"{found.mean:+.2f}".replace("-", "\u2212"),
                ha="center",
                va="center",
                fontsize=7.5,
                weight="bold" if is_clear else "normal",
                color="white" if abs(found.mean) > 0.7 * _LARGEST else "black",
            )
            if trait == own.get(name):
                axes.add_patch(Rectangle((place - 0.48, line - 0.46), 0.96, 0.92, fill=False, edgecolor="black"))
    axes.set_xticks(range(len(traits)), traits, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(moves)), list(moves))
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
