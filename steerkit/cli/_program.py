"""How every command ends: errors and warnings as one line on stderr, and the exit code."""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from steerkit.errors import SteerError

__all__ = ["Program"]


class Program(TyperGroup):
    """The group of commands. A closed pipe and wrong usage are typer's business."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                result = super().invoke(ctx)
                sys.stdout.flush()  # a reader that has gone is noticed here, not while Python shuts down
                return result
        except SteerError as error:
            if ctx.params["debug"]:
                typer.echo(traceback.format_exc(), err=True, nl=False)
            _say("error", error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


def _say(kind: str, message: object) -> None:
    typer.echo(f"{kind}: {' '.join(str(message).splitlines())}", err=True)


def _show_warning(message: Warning | str, *_: Any) -> None:
    _say("warning", message)
