"""`steerkit doctor`: does steering hold on this model what it promises?"""

from __future__ import annotations

from typing import Annotated

import typer

from steerkit._support.progress import bar
from steerkit.cli._data import NO_DATA, DataChoice, takes_data
from steerkit.cli._findings import print_findings
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import Json, print_json
from steerkit.cli._steering import SteeringOption, check_chosen, chosen

__all__ = ["run"]


@loads_model
@takes_data
def run(
    given: DataChoice = NO_DATA,
    vector: Annotated[
        str | None, typer.Option(metavar="FILE", help="A vector of yours: does it break the attention sink?")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Of --vector. (default: its suggested one)")] = None,
    steering: SteeringOption = None,
    model: ModelChoice = DEFAULT,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile for real; without it, compiling is traced only.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Test on a model that steering holds what it promises, such as cached = uncached. Exit code 1 if something fails.

    Nothing is fitted or written: a random direction is added after a middle block, and every check compares two ways
    to get the same numbers. With your own pairs (--data) two of their texts are read, as they are rendered, and pairs
    whose answers are nearly one thing to the model are named.
    """
    from steerkit.checks.doctor.checks import checks_of, doctor

    given.check()
    if strength is not None and vector is None and steering is None:
        raise typer.BadParameter("--strength is that of a vector; give --vector")
    names, strengths = [] if vector is None else [vector], [] if strength is None else [strength]
    check_chosen(names, strengths, steering)
    own = chosen(names, strengths, steering, model.name).vectors or None
    items = next(part for part in reversed(given.parts()) if part is not None) if given.is_given else None
    loaded, tokenizer = model.load()
    with bar("checking", len(checks_of(items, own))) as step:
        findings = doctor(loaded, tokenizer, data=items, vector=own, compiled=compiled, step=step)
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        print_findings(model.name, findings, "steering holds what it promises")
    if not all(finding.passed for finding in findings):
        raise typer.Exit(1)
