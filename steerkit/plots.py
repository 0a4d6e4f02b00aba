"""Pictures. Matplotlib is the extra `plots`; nothing else of steerkit needs it.

Every picture is drawn from plain data, in colours that colour-blind readers and grey printers tell apart (Okabe and Ito
2008) and never by colour alone. The same data gives the same bytes with the same matplotlib.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from steerkit.errors import SteerError
from steerkit.evaluate.curve import Curve
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.sweep import Point
from steerkit.files import write_whole
from steerkit.methods._base import Map

__all__ = [
    "Bar",
    "Panel",
    "Spot",
    "costs_svg",
    "curve_svg",
    "forest_svg",
    "histogram_svg",
    "plot_curve",
    "plot_maps",
    "plot_sweep",
    "plot_tokens",
    "ready",
    "separation_svg",
    "spots_svg",
    "svg",
]

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#9C4F80", "#767676"
LINES = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#A6761D", "#333333")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 6.2
STYLE: Mapping[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "steerkit",
    "svg.fonttype": "path",
    "axes.unicode_minus": True,
    "text.parse_math": False,
}


class Panel(NamedTuple):
    """One cost over strengths.

    Attributes:
        title: what it is.
        unit: of the numbers.
        strengths: rising.
        values: at each strength, with intervals.
        bare: of the unsteered model; None draws no line.
    """

    title: str
    unit: str
    strengths: Sequence[float]
    values: Sequence[Estimate]
    bare: float | None = None


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


def ready() -> None:
    """Find out whether pictures can be drawn, before work is spent on what they would show.

    Raises:
        SteerError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise SteerError("pictures need matplotlib; pip install 'steerkit-hf[plots]'") from None


def plot_curve(curve: Curve, path: str | Path, *, title: str, unit: str = "paper") -> Path:
    """Draw a dose-response curve with its interval and the random directions beside it.

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
    with _style():
        figure, axes = _figure(WIDTH, 4.0)
        _draw_curve(axes, curve, unit, None)
        axes.set_title(f"{title}, {curve.items} held-out items")
        return _save(figure, Path(path))


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
    with _style():
        figure, axes = _figure(WIDTH, 3.8)
        _draw_curve(axes, curve, unit, marked)
        return svg(figure)


def plot_sweep(points: Sequence[Point], effect: str, path: str | Path) -> Path:
    """Draw a sweep: the effect over strengths, a line for each set of layers, and below it the KL divergence.

    Args:
        points: of `steerkit.evaluate.sweep.sweep`.
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
    with _style():
        figure, grid = _figure(WIDTH + 1.2, 5.6 if has_kl else 3.8, rows=2 if has_kl else 1, sharex=True)
        panels = list(grid) if has_kl else [grid]
        columns = [effect, "kl"][: len(panels)]
        for axes, column in zip(panels, columns, strict=True):
            for number, (layers, line) in enumerate(lines.items()):
                _draw_line(axes, sorted(line, key=lambda one: one.strength or 0.0), column, layers, number)
            found = next(iter(lines.values()))[0].scores[column].column
            axes.set_ylabel(_sentence(f"{found.title}\n({found.unit})"))
        bare = next((point.scores[effect].estimate.mean for point in points if point.strength is None), None)
        if bare is not None:
            panels[0].axhline(bare, color=GREY, linewidth=1, linestyle=":", label="unsteered")
        panels[-1].set_xlabel("strength")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
        return _save(figure, Path(path))


def plot_maps(maps: Sequence[Map], path: str | Path, *, title: str, layers: int) -> Path:
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
    with _style():
        figure, grid = _figure(
            3.8 * len(maps), max(3.4, 1.7 + 0.12 * layers), columns=len(maps), sharey=True, squeeze=False
        )
        for axes, one in zip(grid.flat, maps, strict=True):
            _draw_map(figure, axes, one, layers)
        grid.flat[0].set_ylabel("block, counted from 0")
        figure.suptitle(title, fontsize=10)
        return _save(figure, Path(path))


def plot_tokens(texts: Sequence[Sequence[tuple[str, str]]], path: str | Path, *, title: str) -> Path:
    """Write a picture of texts with a colour behind every token.

    Args:
        texts: per text its tokens, each with a colour; a line end in a token ends the line.
        path: a .png, .svg or .pdf file.
        title: what it shows.

    Returns:
        The path.

    Raises:
        SteerError: matplotlib is missing, or the file cannot be written.
    """
    lines = [line for text in texts for line in [*_lines_of(text), []]]
    with _style():
        figure, axes = _figure(WIDTH_OF_TEXT * 0.085 + 0.3, max(1.2, 0.24 * len(lines) + 0.5))
        axes.set_axis_off()
        axes.set_xlim(0, WIDTH_OF_TEXT)
        axes.set_ylim(len(lines), 0)
        axes.set_title(title, loc="left")
        for number, line in enumerate(lines):
            for start, part, colour in line:
                # Boxes of their own: the background of a text is as wide as its font, which may lack a character.
                axes.add_patch(_rectangle(start, number, len(part), colour))
                axes.text(start, number + 0.5, part, family="monospace", fontsize=9, va="center", parse_math=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # models write characters that the font may lack
            return _save(figure, Path(path))


WIDTH_OF_TEXT = 90


def _lines_of(tokens: Sequence[tuple[str, str]]) -> list[list[tuple[int, str, str]]]:
    """Tokens set in lines: each part with its column and its colour."""
    lines: list[list[tuple[int, str, str]]] = [[]]
    column = 0
    for text, colour in tokens:
        for place, part in enumerate(text.split("\n")):
            if place > 0 or (column > 0 and column + len(part) > WIDTH_OF_TEXT):
                lines.append([])
                column = 0
            for start in range(0, len(part), WIDTH_OF_TEXT):
                piece = part[start : start + WIDTH_OF_TEXT]
                if start > 0:
                    lines.append([])
                    column = 0
                lines[-1].append((column, piece, colour))
                column += len(piece)
    return lines


def _rectangle(start: int, line: int, width: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((start, line + 0.05), width, 0.9, facecolor=colour, edgecolor="none", zorder=0)


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
    with _style():
        from matplotlib.ticker import MaxNLocator

        figure, (upper, lower) = _figure(WIDTH, 4.2, rows=2, sharex=True)
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
    with _style():
        from matplotlib.ticker import MaxNLocator

        figure, axes = _figure(WIDTH, 3.2)
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
    with _style():
        rows = math.ceil(len(panels) / 2)
        figure, grid = _figure(WIDTH, 2.3 * rows, rows=rows, columns=2, sharex=True, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _band(axes, panel.strengths, panel.values, BLUE, "o")
            if panel.bare is not None:
                axes.axhline(panel.bare, color=GREY, linewidth=1, linestyle=":")
            if marked is not None:
                axes.axvline(marked, color=ORANGE, linewidth=1, linestyle="--", zorder=0)
            axes.set_title(_sentence(panel.title), loc="left")
            axes.set_ylabel(panel.unit)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel(f"strength ({unit} unit)", fontsize=10)
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
    with _style():
        figure, axes = _figure(WIDTH, 4.2)
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
    with _style():
        figure, axes = _figure(WIDTH, 1.3 + 0.34 * len(bars))
        for place, bar in enumerate(bars):
            if bar.controls is not None:
                low, high = bar.controls
                label = "controls" if not any(other.controls for other in bars[:place]) else None
                axes.plot([low, high], [place, place], color="0.75", linewidth=8, solid_capstyle="butt", label=label)
            if bar.effect is None:
                axes.annotate("nothing found", (0, place), xytext=(4, 0), textcoords="offset points", va="center")
                continue
            low, high = _finite(bar.effect)
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


def svg(figure: Any) -> str:
    """A figure as SVG text; the same figure gives the same text.

    Args:
        figure: of matplotlib.

    Returns:
        SVG, without date and creator.
    """
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    """Our look, whatever the caller's settings are."""
    ready()
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _figure(width: float, height: float, *, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of its own, in inches, that no window system and no global state knows of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _save(figure: Any, path: Path) -> Path:
    """Write a figure, whole or not at all.

    Raises:
        SteerError: it cannot be written there, or matplotlib does not know the ending.
    """
    form = path.suffix.removeprefix(".").lower() or "png"
    if form not in figure.canvas.get_supported_filetypes():
        raise SteerError(f"{path}: a picture is a .png, .svg or .pdf file")
    buffer = io.BytesIO()
    if form == "svg":
        buffer.write(svg(figure).encode())
    else:
        dates = {"CreationDate": None} if form == "pdf" else None
        figure.savefig(buffer, format=form, metadata=dates)
    try:
        write_whole(path, buffer.getvalue())
    except OSError as error:
        raise SteerError(f"{path}: the picture cannot be written ({error.strerror})") from None
    return path


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
    _band(axes, curve.strengths, curve.effects, BLUE, "o", label="steered", band="95 % interval")
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    if marked is not None:
        axes.axvline(marked, color=ORANGE, linewidth=1.2, linestyle="--", zorder=0, label="suggested strength")
    axes.set_xlabel(f"strength ({unit} unit)")
    column = curve.points[0][curve.effect].column
    axes.set_ylabel(f"{column.title} ({column.unit})")
    axes.legend()


def _draw_map(figure: Any, axes: Any, one: Map, layers: int) -> None:
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
    axes.set_title(f"{_sentence(one.title)} (black {'edge' if width <= 64 else 'mark'}: {one.below})")
    axes.set_xlabel(one.across)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(drawn, ax=axes, pad=0.02, location="bottom", aspect=30)
    bar.set_label(f"{one.below} < 0 < {one.above}")


def _draw_line(axes: Any, line: Sequence[Point], column: str, layers: tuple[int, ...], number: int) -> None:
    """One set of layers of a sweep. Past seven sets colours come again, with another dash."""
    dash = ("-", "--", "-.", ":")[number // len(LINES) % 4]
    _band(
        axes,
        [point.strength or 0.0 for point in line],
        [point.scores[column].estimate for point in line],
        LINES[number % len(LINES)],
        MARKS[number % len(MARKS)],
        label=f"block{'s' if len(layers) > 1 else ''} {'+'.join(map(str, layers))}",
        dash=dash,
        alpha=0.1,
    )


def _band(
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
    ends = [_finite(value) for value in values]
    lows, highs = [low for low, _ in ends], [high for _, high in ends]
    axes.fill_between(x, lows, highs, color=colour, alpha=alpha, linewidth=0, label=band)
    means = [value.mean for value in values]
    axes.plot(x, means, color=colour, linestyle=dash, linewidth=1.8, marker=mark, markersize=4.5, label=label, zorder=3)


def _finite(value: Estimate) -> tuple[float, float]:
    """The ends of an interval, the mean where nothing bounds them."""
    low, high = (end if math.isfinite(end) else value.mean for end in (value.low, value.high))
    return low, high


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


def _sentence(text: str) -> str:
    """The text with its first letter large; the others as they are."""
    return text[:1].upper() + text[1:]
