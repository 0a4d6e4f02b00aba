"""The command line. Nothing heavy is imported before the command that needs it runs."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Annotated

import typer

import steerkit
from steerkit._support import collector
from steerkit.cli import (
    attribute,
    audit,
    bake,
    calibrate,
    chat,
    compare,
    demo,
    dictionary,
    discover,
    doctor,
    evaluate,
    evidence,
    explain,
    export,
    extract,
    fetch,
    find_strength,
    gates,
    generate,
    import_,
    inspect,
    interference,
    latents,
    layers,
    lm_eval,
    merge,
    methods,
    monitor,
    persona,
    plan,
    recipe,
    recipes,
    report,
    serve,
    sweep,
    vllm_verify,
)
from steerkit.cli._dictionary import decompose, train
from steerkit.cli._program import Command, Program, paragraphs

__all__ = ["app", "main"]

app = typer.Typer(
    name="steerkit",
    cls=Program,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    demo,
    extract,
    generate,
    inspect,
    explain,
    gates,
    monitor,
    audit,
    discover,
    latents,
    evaluate,
    sweep,
    layers,
    attribute,
    calibrate,
    find_strength,
    compare,
    evidence,
    interference,
    plan,
    doctor,
    report,
    bake,
    merge,
    export,
    import_,
    lm_eval,
    chat,
    serve,
    vllm_verify,
    fetch,
    methods,
    recipes,
):
    _name = _command.__name__.rpartition(".")[2].rstrip("_").replace("_", "-")
    app.command(_name, cls=Command, help=paragraphs(_command.run))(_command.run)
for _run in (train, decompose):
    dictionary.app.command(_run.__name__, cls=Command, help=paragraphs(_run))(_run)
app.add_typer(dictionary.app, name="dictionary")
app.add_typer(persona.app, name="persona")
app.add_typer(recipe.app, name="recipe")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steerkit {steerkit.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="STEERKIT_DEBUG", help="Show the traceback of errors.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Steer Hugging Face language models from inside: learn a direction, apply it, measure what it does.

    Results go to stdout, progress and warnings to stderr.
    Exit codes: 0 fine, 1 an error in one line, 2 wrong usage, 130 interrupted.
    """


def main() -> None:
    """Run the program and leave with its exit code."""
    collector.seldom()
    # Threads that spin while they wait make a machine with other work on it up to ten times slower; those that sleep at
    # once make an idle one a tenth slower. So they spin for some microseconds (libgomp), which is most of the gaps.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # What libraries log while they are loaded, such as which of their parts a machine lacks, is no answer.
    os.environ.setdefault("TORCH_LOGS", "-torch")
    logging.getLogger().setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # models write characters that not every terminal knows
    app(prog_name="steerkit")
