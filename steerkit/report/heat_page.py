"""Texts with a colour behind every token, as an HTML page or a picture: how far each token lies along a direction."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from steerkit._support.files import write_whole
from steerkit.errors import SteerError
from steerkit.monitor.token_heat import TokenScores
from steerkit.report.heat_cells import Token, token_cells
from steerkit.report.plots.tokens import plot_tokens

__all__ = ["heat_html", "write_heat"]

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.7 system-ui, sans-serif; margin: 2rem auto; max-width: 50rem; padding: 0 1rem; color: #111; \
background: #fff; overflow-wrap: anywhere }}
.text {{ white-space: pre-wrap; color: #111; background: #fff; padding: .5rem .75rem }}
span.up {{ border-bottom: 2px solid #1f6fa8 }} span.down {{ border-bottom: 2px dotted #a85a14 }}
.prompt {{ opacity: 0.75 }}
@media (prefers-color-scheme: dark) {{
body {{ color: #e6e6e6; background: #16181a }}
.text {{ filter: invert(.91) hue-rotate(180deg) }}
}}
</style></head><body><h1>{title}</h1>
<p>{words}</p>
{texts}
</body></html>
"""


def heat_html(texts: Sequence[TokenScores], *, title: str, middle: float) -> str:
    """A page that loads nothing from outside.

    Args:
        texts: tokens with their values.
        title: the page's title.
        middle: the value shown as white.

    Returns:
        HTML.
    """
    scale = _scale(texts, middle)
    words = (
        f"Projection of every token on the direction at {texts[0].site}, activation units; no colour is {middle:.3g}, "
        f"where neutral texts lie. Blue and underlined is further along, orange and dotted the other way; colours end "
        f"at {scale:.3g}. The number stands with each token; a text's first token often lies far outside."
    )
    paragraphs = [_paragraph(token_cells(one, middle, scale), one.prompt) for one in texts]
    return _PAGE.format(title=escape(title), words=escape(words), texts="\n".join(paragraphs))


def write_heat(texts: Sequence[TokenScores], path: str | Path, *, title: str, middle: float) -> Path:
    """Write a heat map, whole or not at all.

    Args:
        texts: tokens with their values.
        path: ending in .html, .png, .svg or .pdf.
        title: what it shows.
        middle: the value shown as white.

    Returns:
        The path.

    Raises:
        SteerError: it cannot be written there, or the ending is none of these.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        scale = _scale(texts, middle)
        cells = [[(cell.text, cell.colour) for cell in token_cells(one, middle, scale)] for one in texts]
        return plot_tokens(cells, target, title=title)
    try:
        write_whole(target, heat_html(texts, title=title, middle=middle).encode())
    except OSError as error:
        raise SteerError(f"{target}: the page cannot be written ({error.strerror})") from None
    return target


def _scale(texts: Sequence[TokenScores], middle: float) -> float:
    """Where colours end: the largest distance of a token that is not the first of its text."""
    return (
        max((float((one.values[1:] - middle).abs().max()) for one in texts if len(one.values) > 1), default=1.0) or 1.0
    )


def _paragraph(cells: Sequence[Token], prompt: int) -> str:
    shown = [
        f'<span class="{cell.kind}{" prompt" if place < prompt else ""}" style="background:{cell.colour}" '
        f'title="{cell.title}">{escape(cell.text)}</span>'
        for place, cell in enumerate(cells)
    ]
    return f'<p class="text">{"".join(shown)}</p>'
