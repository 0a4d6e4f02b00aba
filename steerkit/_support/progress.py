"""Progress on stderr: a bar or a spinner at a terminal; elsewhere, as in a log, a plain line every few seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["EVERY", "bar", "counted", "status"]

EVERY = 5.0
"""Seconds before the first plain line and, at least, between two of them; long runs get fewer: one each tenth."""


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show how much of something is done.

    Args:
        title: what is being done.
        total: of how many steps it consists.

    Yields:
        What to call after each step.
    """
    if not sys.stderr.isatty():
        done = 0
        with _lines(title) as say:

            def step() -> None:
                nonlocal done
                done += 1
                say(f"{title}: {done} of {total}")

            yield step
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(title, total=total)
        yield lambda: shown.advance(task)


@contextmanager
def status(first: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done, in a few words.

    Args:
        first: what is done at first.

    Yields:
        What to call with the words for what is done next.
    """
    if not sys.stderr.isatty():
        with _lines(first) as say:
            yield say
        return
    from rich.console import Console

    with Console(stderr=True, markup=False, highlight=False, emoji=False).status(first) as line:
        yield line.update


def counted(say: Callable[[str], None], title: str, total: int) -> Callable[[], None]:
    """Make a progress line count, so that it changes while one thing takes long.

    Args:
        say: what shows a line.
        title: what is being done.
        total: of how many steps it consists.

    Returns:
        What to call after each step; the first step is announced at once.
    """
    done = iter(range(2, total + 1))
    say(f"{title}: 1 of {total}")

    def step() -> None:
        number = next(done, None)
        if number is not None:
            say(f"{title}: {number} of {total}")

    return step


@contextmanager
def _lines(first: str) -> Iterator[Callable[[str], None]]:
    """Print the newest words now and then while they change; what ends within `EVERY` seconds prints nothing."""
    newest, stream, start, ended = [first], sys.stderr, time.monotonic(), threading.Event()

    def report() -> None:
        printed = None
        while not ended.wait(max(EVERY, (time.monotonic() - start) / 10)):
            if newest[0] != printed:
                printed = newest[0]
                print(f"{printed} ({time.monotonic() - start:.0f} s)", file=stream, flush=True)

    reporter = threading.Thread(target=report, name="steerkit-progress", daemon=True)
    reporter.start()
    try:
        yield lambda words: newest.__setitem__(0, words)
    finally:
        ended.set()
        reporter.join()
