"""Effect over strength: the curve of one vector, and a sweep over layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerkit.errors import SteerError
from steerkit.evaluate.curve import Curve
from steerkit.evaluate.sweeps import Point
from steerkit.report.plots.bands import draw_band
from steerkit.report.plots.drawing import (
    BLUE,
    GREY,
    LINES,
    MARKS,
    ORANGE,
    WIDTH,
    new_figure,
    save,
    sentence,
    style,
    svg,
)

__all__ = ["curve_svg", "plot_curve", "plot_sweep"]


def plot_curve(curve: Curve, path: str | Path, *, title: str, unit: str = "paper") -> Path:
    """Draw the effect over strengths with its interval and the random directions beside it.

    Args:
        curve: what to draw.
        path: a .png, .svg or .pdf file.
        title: above the picture.
        unit: of the strength, for the axis.

    Returns:
        The path written.

    Raises:
        SteerError: matplotlib is not installed, or the file cannot be written.
    """
    with style():
        figure, axes = new_figure(WIDTH, 4.0)
        _draw_curve(axes, curve, unit, None)
        axes.set_title(f"{title}, {curve.items} held-out items")
        return save(figure, Path(path))


def curve_svg(curve: Curve, *, unit: str = "paper", marked: float | None = None) -> str:
    """The same as SVG text, without a title.

    Args:
        curve: what to draw.
        unit: of the strength, for the axis.
        marked: a strength to mark as suggested.

    Returns:
        SVG.

    Raises:
        SteerError: matplotlib is not installed.
    """
    with style():
        figure, axes = new_figure(WIDTH, 3.8)
        _draw_curve(axes, curve, unit, marked)
        return svg(figure)


def plot_sweep(points: Sequence[Point], effect: str, path: str | Path) -> Path:
    """Draw a sweep: the effect over strengths, a line for each set of layers, and below it the KL divergence.

    Args:
        points: of `steerkit.evaluate.sweep`.
        effect: the column that shows the effect.
        path: a .png, .svg or .pdf file.

    Returns:
        The path written.

    Raises:
        SteerError: matplotlib is not installed, there is no steered point, or the file cannot be written.
    """
    lines: dict[tuple[int, ...], list[Point]] = {}
    for point in points:
        if point.strength is not None and effect in point.scores:
            lines.setdefault(point.layers, []).append(point)
    if not lines:
        raise SteerError(f"a sweep without a steered point that has {effect!r} cannot be drawn; give some")
    has_kl = all("kl" in point.scores for line in lines.values() for point in line)
    with style():
        figure, grid = new_figure(WIDTH + 1.2, 5.6 if has_kl else 3.8, rows=2 if has_kl else 1, sharex=True)
        panels = list(grid) if has_kl else [grid]
        columns = [effect, "kl"][: len(panels)]
        for axes, column in zip(panels, columns, strict=True):
            for number, (layers, line) in enumerate(lines.items()):
                _draw_line(axes, sorted(line, key=lambda one: one.strength or 0.0), column, layers, number)
            found = next(iter(lines.values()))[0].scores[column].column
            axes.set_ylabel(sentence(f"{found.title}\n({found.unit})"))
        baseline = next((point.scores[effect].estimate.mean for point in points if point.strength is None), None)
        if baseline is not None:
            panels[0].axhline(baseline, color=GREY, linewidth=1, linestyle=":", label="unsteered")
        panels[-1].set_xlabel("strength")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
        return save(figure, Path(path))


def _draw_curve(axes: Any, curve: Curve, unit: str, marked: float | None) -> None:
    for number, control in enumerate(curve.controls):
        label = f"{len(curve.controls)} random directions, same norm" if number == 0 else None
        axes.plot(
            list(control),
            list(control.values()),
            color="0.55",
            linewidth=0.8,
            linestyle=":",
            marker="x",
            markersize=4,
            label=label,
            zorder=1,
        )
    draw_band(axes, curve.strengths, curve.effects, BLUE, "o", label="steered", band="95 % interval")
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    if marked is not None:
        axes.axvline(marked, color=ORANGE, linewidth=1.2, linestyle="--", zorder=0, label="suggested strength")
    axes.set_xlabel(f"strength ({unit} unit)")
    column = curve.points[0][curve.effect].column
    axes.set_ylabel(f"{column.title} ({column.unit})")
    axes.legend()


def _draw_line(axes: Any, line: Sequence[Point], column: str, layers: tuple[int, ...], number: int) -> None:
    """One set of layers of a sweep. Past seven sets colours come again, with another dash."""
    dash = ("-", "--", "-.", ":")[number // len(LINES) % 4]
    draw_band(
        axes,
        [point.strength or 0.0 for point in line],
        [point.scores[column].estimate for point in line],
        LINES[number % len(LINES)],
        MARKS[number % len(MARKS)],
        label=f"block{'s' if len(layers) > 1 else ''} {'+'.join(map(str, layers))}",
        dash=dash,
        alpha=0.1,
    )
