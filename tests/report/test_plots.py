"""Pictures: what they show is read back from matplotlib's own objects or from the SVG, never from how they look."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from steerkit.errors import SteerError
from steerkit.evaluate.curve import Curve
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.scorers._base import Column
from steerkit.evaluate.scoring import Measured
from steerkit.evaluate.sweeps import Point
from steerkit.methods._protocols import HeatMap
from steerkit.report import plots
from steerkit.report.plots import curves, drawing, maps, scatter
from steerkit.report.plots import tokens as tokens_module

MARGIN, KL = Column("preference margin", "nats per token", "higher"), Column("KL divergence", "nats per token", "lower")
STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 1.5, 2.0)


def of(column: Column, mean: float, half: float = 0.1) -> Measured:
    return Measured(column, Estimate(mean, mean - half, mean + half), None, 28)


def curve() -> Curve:
    points = tuple({"margin": of(MARGIN, 0.5 * strength), "kl": of(KL, 0.1 * strength**2)} for strength in STRENGTHS)
    return Curve("margin", STRENGTHS, points, ({-2.0: 0.1, 2.0: -0.1}, {-2.0: 0.0, 2.0: 0.2}), 28)


def sweep(layers: Sequence[tuple[int, ...]] = ((1,), (1, 2))) -> list[Point]:
    baseline = Point((), None, {"margin": of(MARGIN, 0.0), "kl": of(KL, 0.0)})
    steered = [
        Point(one, strength, {"margin": of(MARGIN, strength * len(one)), "kl": of(KL, strength**2)})
        for one in layers
        for strength in (2.0, 1.0)
    ]
    return [baseline, *steered]


def spots(count: int) -> list[plots.Spot]:
    return [plots.Spot(f"point {n}", 0.1 + 0.001 * n, 0.5 + 0.001 * n, n % 2, n == 0) for n in range(count)]


def all_pictures() -> dict[str, str]:
    estimate = Estimate(0.4, 0.2, float("inf"))  # one item only: nothing bounds it
    return {
        "curve": plots.curve_svg(curve(), marked=1.5),
        "separation": plots.separation_svg({0: 0.5, 1: 0.9}, {0: 0.0, 1: 2.0}, [1]),
        "histogram": plots.histogram_svg([1.0, 2.0], [0.0, 0.5], label="projection"),
        "one value": plots.histogram_svg([1.0], [1.0], label="projection"),
        "costs": plots.costs_svg([plots.Panel("words", "words", (0.0, 1.0), [estimate, estimate], 0.4)] * 3),
        "spots": plots.spots_svg(
            spots(12), kinds=["a", "b"], effect="effect", cost="KL", front=[(0.1, 0.5), (0.2, 0.6)]
        ),
        "forest": plots.forest_svg(
            [plots.Bar("caa", estimate, (-0.1, 0.1), True), plots.Bar("none", None, None, False)], effect="effect"
        ),
    }


def test_every_picture_is_well_formed_and_the_same_every_time() -> None:
    first, second = all_pictures(), all_pictures()
    for name, text in first.items():
        assert ElementTree.fromstring(text).tag.endswith("svg"), name
        assert text == second[name], name
        assert "dc:date" not in text, name


def test_a_picture_is_ours_whatever_the_callers_settings_are() -> None:
    import matplotlib

    before = plots.curve_svg(curve())
    with matplotlib.rc_context({"font.size": 31, "svg.hashsalt": "other", "axes.facecolor": "red"}):
        assert plots.curve_svg(curve()) == before
        assert matplotlib.rcParams["font.size"] == 31, "the caller's settings come back"


def test_labels_cover_neither_each_other_nor_a_spot(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.text import Text

    seen = []
    kept = plots.svg
    monkeypatch.setattr(scatter, "svg", lambda figure: (seen.append(figure), kept(figure))[1])
    spread = [plots.Spot(f"+{n}", 0.05 * n, 0.1 * (n % 3), 0, n == 2) for n in range(6)]
    for listed in (spots(6), spread):
        plots.spots_svg(listed, kinds=["a", "b"], effect="effect", cost="KL", front=[(0.0, 0.0), (0.1, 0.2)])
        figure = seen.pop()
        (axes,) = figure.axes
        for note in axes.texts:
            note.get_window_extent()  # puts the text in its place
        boxes = [Text.get_window_extent(note) for note in axes.texts]
        assert [note.get_text() for note in axes.texts] == [spot.label for spot in listed]
        places = [axes.transData.transform((spot.cost, spot.effect)) for spot in listed]
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[number + 1 :])
            assert not any(box.contains(*place) for place in places)
            assert axes.get_window_extent().count_contains(box.corners()) == 4, "inside the axes"


def test_the_files_of_plot_curve(tmp_path: Path) -> None:
    starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    for ending, start in starts.items():
        path = plots.plot_curve(curve(), tmp_path / "deep" / f"curve.{ending}", title="costs $5 or $6", unit="norm")
        content = path.read_bytes()
        assert content.startswith(start)
        assert plots.plot_curve(curve(), path, title="costs $5 or $6", unit="norm").read_bytes() == content
    with pytest.raises(SteerError, match="docx: a picture is"):
        plots.plot_curve(curve(), tmp_path / "curve.docx", title="")
    assert not list(tmp_path.glob("*.docx"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SteerError, match="cannot be written"):
        plots.plot_curve(curve(), tmp_path / "file" / "curve.png", title="")


def test_a_sweep_has_a_line_for_each_set_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    kept = drawing.save
    monkeypatch.setattr(curves, "save", lambda figure, path: (seen.append(figure), kept(figure, path))[1])
    plots.plot_sweep(sweep(), "margin", tmp_path / "sweep.png")
    upper, lower = seen[0].axes
    lines = {line.get_label(): line for line in upper.get_lines()}
    assert set(lines) == {"block 1", "blocks 1+2", "unsteered"}
    assert list(lines["blocks 1+2"].get_xdata()) == [1.0, 2.0], "rising"
    assert list(lines["blocks 1+2"].get_ydata()) == [2.0, 4.0]
    assert [list(line.get_ydata()) for line in lower.get_lines()] == [[1.0, 4.0], [1.0, 4.0]]
    assert upper.get_ylabel() == "Preference margin\n(nats per token)"
    with pytest.raises(SteerError, match="without a steered point"):
        plots.plot_sweep(sweep()[:1], "margin", tmp_path / "sweep.png")


def test_a_sweep_without_kl_has_one_panel(tmp_path: Path) -> None:
    points = [Point(one.layers, one.strength, {"margin": one.scores["margin"]}) for one in sweep()]
    text = plots.plot_sweep(points, "margin", tmp_path / "sweep.svg").read_text()
    assert len(re.findall(r'id="axes_\d+"', text)) == 1


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        plots.ready,
        lambda: plots.plot_curve(curve(), tmp_path / "curve.png", title=""),
        lambda: plots.plot_sweep(sweep(), "margin", tmp_path / "sweep.png"),
        lambda: plots.histogram_svg([1.0], [0.0], label=""),
    ):
        with pytest.raises(SteerError, match=r"pip install 'steerkit-hf\[plots\]'"):
            draw()


def test_maps_mark_what_is_under_zero_and_leave_zeros_blank(tmp_path: Path) -> None:
    few = HeatMap("heads", "head", {0: [0.0, 2.0, -1.0], 3: [-4.0]}, "reinforce", "suppress")
    many = HeatMap("neurons", "rank", {1: [*[1.0] * 40, *[-2.0] * 30], 2: [-1.0] * 3}, "reinforce", "suppress")
    with drawing.style():
        figure, (left, right) = drawing.new_figure(6.0, 4.0, columns=2)
        maps._draw_map(figure, left, few, 5)
        maps._draw_map(figure, right, many, 5)
    (mesh,) = left.collections
    drawn = mesh.get_array().reshape(5, 3)
    assert [(row, place) for row in range(5) for place in range(3) if not drawn.mask[row, place]] == [
        (0, 1),
        (0, 2),
        (3, 0),
    ]
    assert mesh.norm.vmin == -4.0 and mesh.norm.vmax == 4.0
    assert sorted(patch.get_xy() for patch in left.patches) == [(-0.42, 2.58), (1.58, -0.42)]
    marks = [line.get_xdata()[0] for line in right.lines]
    assert sorted(marks) == [-0.5, 39.5], "one mark where each row falls below zero"
    assert not right.patches
    assert "suppress" in left.get_title() and "reinforce" in figure.axes[2].get_xlabel()
    one = plots.plot_maps([few, many], tmp_path / "a.svg", title="t", layers=5).read_bytes()
    assert one == plots.plot_maps([few, many], tmp_path / "b.svg", title="t", layers=5).read_bytes()
    with pytest.raises(SteerError, match="no parts"):
        plots.plot_maps([], tmp_path / "c.svg", title="t", layers=5)


def test_tokens_are_set_in_lines_with_their_colours(tmp_path: Path) -> None:
    tokens = [("One ", "#111111"), ("two\u21b5\n", "#222222"), ("x" * 200, "#333333"), ("\U0001f600 $5", "#444444")]
    lines = tokens_module._lines_of(tokens)
    assert [[part for _, part, _ in line] for line in lines] == [
        ["One ", "two\u21b5"], ["x" * 90], ["x" * 90], ["x" * 20, "\U0001f600 $5"],
    ]  # fmt: skip
    for line in lines:
        assert [start for start, _, _ in line] == [sum(len(part) for _, part, _ in line[:n]) for n in range(len(line))]
    written = plots.plot_tokens([tokens, tokens], tmp_path / "tokens.svg", title="caa at resid_post.1")
    drawn = written.read_text()
    assert all(drawn.count(colour) == 2 * count for colour, count in (("#111111", 1), ("#333333", 3), ("#444444", 1)))
    with pytest.raises(SteerError, match="a picture is"):
        plots.plot_tokens([tokens], tmp_path / "tokens.txt", title="")
