"""`steerkit bake`: vectors written into the weights of a model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from steerkit._support.progress import status
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import Json, comparison, print_json, stdout, table

__all__ = ["run"]


VectorOption = Annotated[
    list[str], typer.Option(metavar="FILE", help="A vector file or a shipped vector's name; repeatable.")
]
StrengthOption = Annotated[
    list[float] | None,
    typer.Option(help="One for each vector, in unit paper. (default: the file's suggested strength)"),
]
UntieOption = Annotated[
    bool, typer.Option("--untie", help="Give a head tied to the embeddings weights of its own, where needed.")
]


@loads_model
def run(
    vector: VectorOption,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    strength: StrengthOption = None,
    scope: Annotated[str | None, typer.Option(help="all: accept that every token is written.")] = None,
    untie: UntieOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that stands there.")] = False,
    model: ModelChoice = DEFAULT,
    as_json: Json = False,
) -> None:
    """Write vectors into the weights of a model: a checkpoint that transformers loads without steerkit.

    Weights act at every token, and most vectors were measured on the response
    only: --scope all accepts the difference. The checkpoint is loaded again and
    compared with the hooks; it stays only if it does what they do.
    """
    if strength and len(strength) != len(vector):
        raise typer.BadParameter(f"{len(strength)} --strength for {len(vector)} --vector; give as many, or none")

    from steerkit._support.files import check_folder
    from steerkit._support.shipped import vector_path
    from steerkit.steering.weights import exact_strength
    from steerkit.vector.steering_vector import SteeringVector

    vectors = [
        SteeringVector.load(vector_path(name, model.name)).at(strength=dose, scope=scope)
        for name, dose in itertools.zip_longest(vector, strength or [])
    ]
    for one in vectors:
        exact_strength(one)
    check_folder(out, replace=force)

    from steerkit.export.baking import bake

    loaded, tokenizer = model.load()
    with status("writing the checkpoint, and comparing it with the hooks"):
        baked = bake(loaded, tokenizer, vectors, out, untie=untie, force=force)
    facts = {
        "changed": len(baked.changed),
        "new_biases": len(baked.added),
        "untied": list(baked.untied),
        "config": dict(baked.switches),
        **comparison(baked.verification),
    }
    if as_json:
        listed = vector if len(vector) > 1 else vector[0]
        print_json({"folder": str(out), "vector": listed, **facts})
        return
    console, shown = stdout(), table("", str(out))
    for name, value in facts.items():
        if value or isinstance(value, int | float):
            shown.add_row(name.replace("_", " "), _text(value))
    console.print(shown)
    console.print(f'AutoModelForCausalLM.from_pretrained("{out}")', soft_wrap=True)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={entry}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
