"""Pictures. Matplotlib is the extra `plots`; nothing else of steerkit needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steerkit.errors import SteerError
from steerkit.evaluate.curve import Curve

__all__ = ["plot_curve"]


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
    pyplot = _pyplot()
    path = Path(path)
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    means = [estimate.mean for estimate in curve.effects]
    for number, control in enumerate(curve.controls):
        label = f"{len(curve.controls)} random directions, same norm" if number == 0 else None
        axes.plot(curve.strengths, control, color="0.65", linewidth=1, marker=".", markersize=4, label=label, zorder=1)
    axes.fill_between(
        curve.strengths,
        [estimate.low for estimate in curve.effects],
        [estimate.high for estimate in curve.effects],
        color="#1f77b4",
        alpha=0.2,
        linewidth=0,
        label="95 % interval",
    )
    axes.plot(curve.strengths, means, color="#1f77b4", linewidth=2, marker="o", markersize=5, label="steered", zorder=3)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel(f"strength ({unit} unit)")
    column = curve.points[0][curve.effect].column
    axes.set_ylabel(f"{column.title} ({column.unit})")
    axes.set_title(f"{title}, {curve.items} held-out items", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise SteerError(f"{path}: the picture cannot be written ({error.strerror})") from None
    finally:
        pyplot.close(figure)
    return path


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SteerError("pictures need matplotlib; pip install 'steerkit-hf[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
