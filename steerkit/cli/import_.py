"""`steerkit import`: a vector file of what another program wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerkit._support.progress import status
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import Json, print_json, sites_table, stdout, usage_line
from steerkit.cli._written import check_written

__all__ = ["run"]

_NEUTRAL = 8  # texts on which activation norms are measured


@loads_model
def run(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A GGUF control vector, .svec, .pt, .npy or safetensors file.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the vector file.")],
    model: ModelChoice = DEFAULT,
    layers: Annotated[
        str | None, typer.Option(help="Blocks counted from 0: which to take, or where the rows of an array belong.")
    ] = None,
    tensor: Annotated[str | None, typer.Option(metavar="NAME", help="Of several named tensors, which one.")] = None,
    as_json: Json = False,
) -> None:
    """Make a vector file of a direction that another program wrote, told by its content; nothing in it is run.

    A plain addition at the output of each block, at strength 1 what the file holds. Activation norms and a strength are
    measured on a few neutral texts.
    """
    from steerkit.evaluate.suggesting import with_suggestion
    from steerkit.methods._registry import example_strength
    from steerkit.prompts.neutral import neutral_texts
    from steerkit.vector.foreign.importing import import_vector, read_foreign

    if out == file:
        raise typer.BadParameter(f"--out {out} would overwrite what is read")
    read_foreign(file, tensor=tensor)  # what is wrong with the file is told before a model is loaded
    check_written(layers=layers)
    check_writable(out)
    loaded, tokenizer = model.load()
    neutral = list(neutral_texts())[:_NEUTRAL]
    vector = import_vector(file, loaded, tokenizer, layers=layers, tensor=tensor, neutral=neutral)
    with status("finding a strength"):
        vector = with_suggestion(loaded, tokenizer, vector)
    vector.save(out)
    if as_json:
        print_json({"file": str(out), **vector.describe()})
        return
    count = f"{len(vector.sites)} direction" + "s" * (len(vector.sites) > 1)
    typer.echo(f"wrote {out}\n{vector.extra['imported_from']}: {count}, scope {vector.scope}")
    stdout().print(sites_table(vector.describe()))
    typer.echo(
        f"use it:\n  {usage_line('How was your day?', str(out), strength=example_strength(vector), model=model)}"
    )
