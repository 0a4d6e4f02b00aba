"""`steerkit bake`: vectors written into the weights of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from steerkit._support.progress import status
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import Json, comparison, print_json, stdout, table
from steerkit.cli._steering import SteeringOption, check_chosen, chosen

__all__ = ["run"]


VectorOption = Annotated[
    list[str] | None, typer.Option(metavar="FILE", help="A vector file, a shipped name, or hub:USER/NAME; repeatable.")
]
StrengthOption = Annotated[
    list[float] | None,
    typer.Option(help="One for each vector, in unit paper. (default: the file's suggested strength)"),
]
UntieOption = Annotated[
    bool, typer.Option("--untie", help="Give a head tied to the embeddings weights of its own, where needed.")
]
FromDiskOption = Annotated[
    bool,
    typer.Option(
        "--from-disk", help="Load no model: for checkpoints larger than memory. A killed command goes on where it was."
    ),
]
NoVerifyOption = Annotated[
    bool, typer.Option("--no-verify", help="With --from-disk: compare nothing with the hooks; the card says so.")
]


@loads_model
def run(
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    vector: VectorOption = None,
    strength: StrengthOption = None,
    steering: SteeringOption = None,
    scope: Annotated[str | None, typer.Option(help="all: accept that every token is written.")] = None,
    untie: UntieOption = False,
    from_disk: FromDiskOption = False,
    no_verify: NoVerifyOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that stands there.")] = False,
    model: ModelChoice = DEFAULT,
    as_json: Json = False,
) -> None:
    """Write vectors into the weights of a model: a checkpoint that transformers loads without steerkit.

    Weights act at every token, and most vectors were measured on the response
    only: --scope all accepts the difference. The checkpoint is loaded again and
    compared with the hooks; it stays only if it does what they do.
    """
    _check_road(from_disk, no_verify, model)
    if not vector and steering is None:
        raise typer.BadParameter("give a --vector, or several in one line with --steering")
    check_chosen(vector, strength, steering, scope=scope)

    from steerkit._support.files import check_folder
    from steerkit.steering.weights import exact_strength

    used = chosen(vector, strength, steering, model.name, scope=scope)
    for one in used.vectors:
        exact_strength(one)
    check_folder(out, replace=force)

    from steerkit.export import bake, bake_on_disk

    loaded = None if from_disk else model.load()
    with status("writing the checkpoint" + ("" if no_verify else ", and comparing it with the hooks")):
        if loaded is None:
            baked = bake_on_disk(model.name, used.vectors, out, untie=untie, verify=not no_verify, force=force)
        else:
            baked = bake(*loaded, used.vectors, out, untie=untie, force=force)
    facts = {
        **({"files_resumed": baked.resumed} if from_disk else {}),
        "changed": len(baked.changed),
        "new_biases": len(baked.added),
        "untied": list(baked.untied),
        "config": dict(baked.switches),
        **comparison(baked.verification),
    }
    if as_json:
        listed = used.names if len(used.names) > 1 else used.names[0]
        print_json({"folder": str(out), "vector": listed, **facts})
        return
    console, shown = stdout(), table("", str(out))
    for name, value in facts.items():
        if value or isinstance(value, int | float):
            shown.add_row(name.replace("_", " "), _text(value))
    console.print(shown)
    console.print(f'AutoModelForCausalLM.from_pretrained("{out}")', soft_wrap=True)


def _check_road(from_disk: bool, no_verify: bool, model: ModelChoice) -> None:
    """Refuse options that do not go together.

    Raises:
        BadParameter: a model that is loaded is not to be compared, or the weights on the disk are to be other ones.
    """
    if no_verify and not from_disk:
        raise typer.BadParameter("--no-verify goes with --from-disk; a model that is loaded is always compared")
    others = replace(model, model=None)
    if from_disk and others.is_given:
        flags = ", ".join(flag for flag in others.options() if flag != "--model")
        raise typer.BadParameter(f"--from-disk takes the weights as they lie there; leave {flags} out")


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={entry}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
