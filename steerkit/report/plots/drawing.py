"""Pictures. Matplotlib is the extra `plots`; nothing else of steerkit needs it.

Every picture is drawn from plain data, in colours that colour-blind readers and grey printers tell apart (Okabe and Ito
2008) and never by colour alone. The same data gives the same bytes with the same matplotlib.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steerkit._support.files import write_whole
from steerkit.errors import SteerError
from steerkit.evaluate.intervals import Estimate

__all__ = [
    "BLUE",
    "GREY",
    "LINES",
    "MARKS",
    "ORANGE",
    "WIDTH",
    "finite",
    "new_figure",
    "ready",
    "save",
    "sentence",
    "style",
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


def ready() -> None:
    """Find out whether pictures can be drawn, before work is spent on what they would show.

    Raises:
        SteerError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise SteerError("pictures need matplotlib; pip install 'steerkit-hf[plots]'") from None


def svg(figure: Any) -> str:
    """A figure as SVG text; the same figure gives the same text.

    Args:
        figure: of matplotlib.

    Returns:
        SVG, without date and creator.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Draw in steerkit's style inside the context, whatever the caller's settings are."""
    ready()
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(width: float, height: float, *, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Make a figure without matplotlib's global state; sizes are in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def save(figure: Any, path: Path) -> Path:
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


def finite(value: Estimate) -> tuple[float, float]:
    """The ends of an interval, the mean where nothing bounds them."""
    low, high = (end if math.isfinite(end) else value.mean for end in (value.low, value.high))
    return low, high


def sentence(text: str) -> str:
    """The text with its first letter large; the others as they are."""
    return text[:1].upper() + text[1:]
