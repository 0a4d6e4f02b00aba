"""How answers of a chat are shown: as they come at a terminal, alone or in two columns; whole and plain elsewhere."""

from __future__ import annotations

import re
import statistics
import sys
from typing import TYPE_CHECKING

import typer

from steerkit.cli._chat_session import Answering, Turn
from steerkit.cli._shared import stdout

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from steerkit.serve import Answer

__all__ = ["print_turn", "show"]

_FRAME, _GAP = 5, 3  # lines and columns of a terminal that two answers need besides their text
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def _shown(text: str) -> str:
    """Text that moves no cursor and changes no colour, whatever the model writes."""
    return _CONTROLS.sub("\ufffd", text)


def show(answering: Answering) -> None:
    """Show answers at a terminal while they come, two of them side by side, and whole when they have ended.

    Args:
        answering: with one column, or both.
    """
    from rich.live import Live

    console = stdout()
    with Live(console=console, transient=True, auto_refresh=False) as live:
        for _ in answering:
            live.update(_laid_out(answering.answers, console, tail=True), refresh=True)
    console.print(_laid_out(answering.answers, console))


def _laid_out(answers: dict[str, Answer], console: Console, *, tail: bool = False) -> Table | Text:
    """The answers as lines; with `tail` only as many of the last ones as there is room for."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    is_pair = len(answers) > 1
    width = max((console.width - _GAP) // 2 if is_pair else console.width, 1)
    room = max(console.height - (_FRAME if is_pair else 1), 1) if tail else None
    texts = [Text(_shown(one.text).strip()).wrap(console, width) for one in answers.values()]
    cells = [Text("\n").join(list(lines)[-room:] if room else lines) for lines in texts]
    if not is_pair:
        return cells[0]
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in answers:
        made.add_column(column, width=width)
    made.add_row(*cells)
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
    """Print answers, each behind its column's name where there are two; to the letter where no terminal reads them.

    Args:
        turn: a whole one.
    """
    at_terminal = sys.stdout.isatty()
    for column in turn.answers:
        name = f"{column}: " if len(turn.answers) > 1 else ""
        text = turn.said(column)
        typer.echo(name + (_shown(text) if at_terminal else text))
