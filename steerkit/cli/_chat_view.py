"""How answers of a chat are shown: as they come at a terminal, alone or in two columns; whole and plain elsewhere."""

from __future__ import annotations

import re
import statistics
from typing import TYPE_CHECKING

import typer

from steerkit.cli._chat_session import STEERED, Answering, Turn
from steerkit.cli._shared import stdout

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from steerkit.serve import Answer

__all__ = ["print_turn", "show_columns", "show_one"]

_FRAME = 6  # lines of a terminal that the two columns need besides their text
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def _shown(text: str) -> str:
    """Text that moves no cursor and changes no colour, whatever the model writes."""
    return _CONTROLS.sub("\ufffd", text)


def show_one(answering: Answering) -> None:
    """Print an answer as it comes.

    Args:
        answering: with the steered column alone.
    """
    known = ""
    for _ in answering:
        text = answering.answers[STEERED].text
        typer.echo(_shown(text[len(known) :]), nl=False)
        known = text
    typer.echo()


def show_columns(answering: Answering) -> None:
    """Show two answers side by side while they come, and whole when they have ended.

    Args:
        answering: with both columns.
    """
    from rich.live import Live

    console = stdout()
    with Live(console=console, transient=True, auto_refresh=False) as live:
        for _ in answering:
            live.update(_columns(answering.answers, console, tail=True), refresh=True)
    console.print(_columns(answering.answers, console))


def _columns(answers: dict[str, Answer], console: Console, *, tail: bool = False) -> Table:
    """Both answers; with `tail` only as many of the last lines as there is room for."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    width, room = max(console.width // len(answers) - 2, 1), max(console.height - _FRAME, 1)
    cells = []
    for column, answer in answers.items():
        made.add_column(column, ratio=1)
        lines = list(Text(_shown(answer.text).strip()).wrap(console, width))
        cells.append(Text("\n").join(lines[-room:] if tail else lines))
    made.add_row(*cells)
    made.add_section()
    made.add_row(*(Text(_facts(answer), style="dim") for answer in answers.values()))
    return made


def _facts(answer: Answer) -> str:
    """What there is to say of an answer in a few words, whole or not."""
    words = [f"{len(answer.tokens)} tokens"]
    if answer.done is not None and answer.done.finish == "cancelled":
        words.append("stopped")
    distances = [token.kl for token in answer.tokens if token.kl is not None]
    if distances:
        words.append(f"mean KL {statistics.fmean(distances):.3f} nats")
    return ", ".join(words)


def print_turn(turn: Turn) -> None:
    """Print answers to the letter, each behind its column's name where there are two.

    Args:
        turn: a whole one.
    """
    for column in turn.answers:
        name = f"{column}: " if len(turn.answers) > 1 else ""
        typer.echo(name + turn.said(column))
