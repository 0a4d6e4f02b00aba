"""Texts as a picture with a colour behind every token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerkit.report.plots.drawing import new_figure, save, style

__all__ = ["plot_tokens"]


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
    with style():
        figure, axes = new_figure(WIDTH_OF_TEXT * 0.085 + 0.3, max(1.2, 0.24 * len(lines) + 0.5))
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
            return save(figure, Path(path))


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
