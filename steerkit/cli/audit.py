"""`steerkit audit`: which known vectors the change between two checkpoints lies along, from their weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.json_values import jsonable
from steerkit._support.progress import status
from steerkit.cli._shared import Json, number, print_json, stdout, table

if TYPE_CHECKING:
    from steerkit.monitor.weight_audit import Audit

__all__ = ["run"]

BaseArgument = Annotated[str, typer.Argument(metavar="BASE", help="The model as it was: a folder, alias or hub name.")]
CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="The same model, changed; or the folder of a LoRA.")
]
VectorsOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Vector files to compare with. (default: those shipped for BASE)"),
]
PartsOption = Annotated[int, typer.Option(min=1, help="Leading rank-one parts of each matrix's change.")]
RandomOption = Annotated[int, typer.Option(min=2, help="Random directions, which show what is large.")]
LimitOption = Annotated[int, typer.Option(min=1, help="Vectors and matrices that are shown.")]


def run(
    base: BaseArgument,
    checkpoint: CheckpointArgument,
    vectors: VectorsOption = None,
    parts: PartsOption = 4,
    random: RandomOption = 200,
    limit: LimitOption = 10,
    as_json: Json = False,
) -> None:
    """Show which known vectors the change between two checkpoints lies along.

    Reads safetensors one tensor at a time, builds no model and runs nothing of what it reads; pickles are refused. The
    largest cosine of each vector with a leading rank-one part of a matrix's change stands beside those of random
    directions. A cosine that is large among them and not among the other vectors says nothing special of the vector.
    """
    from steerkit.monitor.adapters import ADAPTER, AdapterDifference
    from steerkit.monitor.checkpoints import Checkpoint
    from steerkit.monitor.weight_audit import audit

    with status("reading") as step:
        is_adapter = (Path(checkpoint) / ADAPTER).is_file()
        before = Checkpoint.of(base)
        after = AdapterDifference(Path(checkpoint)) if is_adapter else Checkpoint.of(checkpoint)
        library = _library(vectors, base)
        step("comparing")
        found = audit(before, after, library, parts=parts, random=random)
    if as_json:
        print_json(jsonable({"base": base, "checkpoint": checkpoint, **found.as_json()}))
        return
    _show(found, limit)


def _library(folder: Path | None, base: str) -> Mapping[str, Any]:
    """The directions of vectors, by name and site.

    Raises:
        BadParameter: there are no vector files.
    """
    from steerkit._support.shipped import shipped_vectors, vector_path
    from steerkit.evaluate.discoveries import directions_of
    from steerkit.vector.steering_vector import SteeringVector

    if folder is not None:
        files = {file.stem: file for file in sorted(folder.glob("*.safetensors"))}
    else:
        files = {name.rpartition("/")[2]: vector_path(name) for name in shipped_vectors(base)}
    if not files:
        where = f"{folder} holds no .safetensors files" if folder is not None else f"no vectors are shipped for {base}"
        raise typer.BadParameter(f"--vectors: {where}; give a folder with vector files")
    return {name: directions_of(SteeringVector.load(file)) for name, file in files.items()}


def _show(found: Audit, limit: int) -> None:
    """The largest changes, the vectors, and what random directions give."""
    console, facts = stdout(), found.as_json()
    count = len(found.changed)
    console.print(f"{count} of {found.compared} tensors differ" + (", the largest changes:" if count else ""))
    if not count:
        return
    changes = table("tensor", "change", "relative", "its parts", right=("change", "relative"))
    for one in found.changed[:limit]:
        shares = " ".join(f"{share:.0%}" for share in one.shares)
        changes.add_row(one.tensor, number(one.size), number(one.relative, ".2%"), shares)
    console.print(changes)
    best = {lies.vector: lies for lies in reversed(found.lies)}  # of each vector its largest cosine
    shown = table("vector", "site", "cosine", "energy", "with the change of", right=("cosine", "energy"))
    for lies in sorted(best.values(), key=lambda one: -one.cosine)[:limit]:
        where = f"{lies.tensor} {lies.part + 1}"
        shown.add_row(lies.vector, str(lies.site), f"{lies.cosine:.3f}", number(lies.energy), where)
    shown.columns[0].no_wrap = shown.columns[1].no_wrap = True
    console.print(shown)
    cosine, energy = facts["random"]["cosine"], facts["random"]["energy"]
    console.print(
        f"{len(found.random)} random directions: cosine {cosine['median']:.3f} (99 % below {cosine['q99']:.3f}), "
        f"energy {energy['median']:.2f} (99 % below {energy['q99']:.2f})"
    )
    if found.left_out:
        tensor, why = next(iter(found.left_out.items()))
        console.print(f"left out: {len(found.left_out)}, such as {tensor}: {why}")
