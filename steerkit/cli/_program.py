"""How every command ends: errors and warnings as one line on stderr, and the exit code."""

from __future__ import annotations

import itertools
import logging
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import getdoc
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from steerkit.errors import SteerError

__all__ = ["Command", "Program", "paragraphs", "say"]


class Program(TyperGroup):
    """The group of commands. A closed pipe and wrong usage are typer's business."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            with warnings.catch_warnings(), _notes():
                warnings.showwarning = _show_warning
                result = super().invoke(ctx)
                sys.stdout.flush()  # a reader that has gone is noticed here, not while Python shuts down
                return result
        except SteerError as error:
            if ctx.params["debug"]:
                typer.echo(traceback.format_exc(), err=True, nl=False)
            say("error", error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


class Command(TyperCommand):
    """A command that takes finite numbers only: nan lies in every range, and infinity is none of what options mean."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line.

        Raises:
            BadParameter: a value is not what its option takes, or a number is nan or infinite.
        """
        words = list(args)
        try:
            rest: list[str] = super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = _with_value(error, words)
            raise
        params: list[Any] = self.params
        for param in params:
            given = ctx.params.get(param.name)
            for value in given if isinstance(given, list | tuple) else (given,):
                if isinstance(value, float) and not math.isfinite(value):
                    raise typer.BadParameter(f"{value} is no finite number; give one", ctx, param)
        return rest


def _with_value(error: typer.BadParameter, words: Sequence[str]) -> str:
    """What is wrong with a value, and the value: typer 0.29 takes the words of pydantic, which do not say it."""
    message = error.message.removeprefix("Value error, ")
    names = getattr(error.param, "opts", ())
    given = [word.partition("=")[2] for word in words if word.partition("=")[0] in names and "=" in word]
    given += [value for name, value in itertools.pairwise(words) if name in names]
    return message.replace("Input should", f"got {', '.join(given)}; it should", 1) if given else message


def paragraphs(run: Callable[..., None]) -> str:
    """The help text of a command: its docstring with each paragraph on one line, so that any terminal can wrap it.

    Args:
        run: the command.
    """
    return "\n\n".join(" ".join(part.split()) for part in (getdoc(run) or "").split("\n\n"))


class _Notes(logging.Handler):
    """Shows what the library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        say("warning" if record.levelno >= logging.WARNING else "note", record.getMessage())


@contextmanager
def _notes() -> Iterator[None]:
    """Show the library's log meanwhile: warnings, and what takes its time."""
    logger, handler = logging.getLogger("steerkit"), _Notes()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def say(kind: str, message: object) -> None:
    """Say something in one line on stderr.

    Args:
        kind: error, warning or note.
        message: what.
    """
    with suppress(OSError):  # a full disk behind stderr ends no work that goes on
        typer.echo(f"{kind}: {' '.join(str(message).splitlines())}", err=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say("warning", message)
