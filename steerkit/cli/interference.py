"""`steerkit interference`: several vectors at once, how alike they are and whether their effects add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerkit._support.progress import status
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import (
    BatchSize,
    Json,
    number,
    print_json,
    stdout,
    table,
)

if TYPE_CHECKING:
    from rich.table import Table

    from steerkit.evaluate.intervals import Estimate
    from steerkit.evaluate.joint_effect import Effect
    from steerkit.evaluate.together import Interference
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]


VectorOption = Annotated[
    list[str], typer.Option(metavar="FILE", help="A vector file, a shipped name, or hub:USER/NAME; two or more.")
]
StrengthOption = Annotated[
    list[float] | None, typer.Option(help="One for each vector. (default: the file's suggested strength)")
]
DataOption = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Held-out pairs, any format, one for each vector. (default: its recipe's)"),
]
OrthogonaliseOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Measure the vectors made orthogonal too, and write them there."),
]
SymmetricOption = Annotated[
    bool, typer.Option("--symmetric", help="Bend all vectors alike, not each against those before it.")
]


@loads_model
def run(
    vector: VectorOption,
    strength: StrengthOption = None,
    data: DataOption = None,
    model: ModelChoice = DEFAULT,
    orthogonalise: OrthogonaliseOption = None,
    symmetric: SymmetricOption = False,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Compare what several vectors do together with what each does alone.

    Shows the cosines between their directions, and on each vector's held-out items the effect of each vector, their
    sum, and what all of them do together. An interaction is what the whole does beyond the sum.
    """
    if len(vector) < 2:
        raise typer.BadParameter(f"got {len(vector)} --vector; give two or more")
    for name, given in (("strength", strength), ("data", data)):
        if given and len(given) != len(vector):
            raise typer.BadParameter(f"{len(given)} --{name} for {len(vector)} --vector; give as many, or none")
    if symmetric and orthogonalise is None:
        raise typer.BadParameter("--symmetric says how to --orthogonalise; give a folder too")

    from steerkit._support.shipped import vector_path
    from steerkit.vector.steering_vector import SteeringVector

    paths = [vector_path(name, model.name) for name in vector]
    loaded = _by_name(paths, [SteeringVector.load(path) for path in paths])
    targets = [] if orthogonalise is None else [orthogonalise / f"{name}.safetensors" for name in loaded]
    for path in paths:
        if path.resolve() in [target.resolve() for target in targets]:
            raise typer.BadParameter(f"--orthogonalise {orthogonalise} would overwrite {path}; choose another folder")
    items = _items(loaded, data)
    for target in targets:
        check_writable(target)

    from steerkit.evaluate.setup import Setup
    from steerkit.evaluate.together import interference

    steered, tokenizer = model.load()
    with status("measuring"):
        found = interference(
            Setup(steered, tokenizer, batch_size=batch_size),
            loaded,
            strength or None,
            data=items,
            measure_orthogonal=orthogonalise is not None,
            symmetric=symmetric,
        )
    if targets:
        for target, turned in zip(targets, found.orthogonalised(symmetric=symmetric).values(), strict=True):
            turned.save(target)
    if as_json:
        print_json({**found.as_json(), "files": [str(target) for target in targets]})
    else:
        _show(found, targets)


def _by_name(paths: Sequence[Path], vectors: Sequence[SteeringVector]) -> dict[str, SteeringVector]:
    """Vectors by the names of their files, told apart where two are the same."""
    found: dict[str, SteeringVector] = {}
    for path, vector in zip(paths, vectors, strict=True):
        name, count = path.stem, 2
        while name in found:
            name, count = f"{path.stem}-{count}", count + 1
        found[name] = vector
    return found


def _items(vectors: Mapping[str, SteeringVector], data: Sequence[Path] | None) -> dict[str, ContrastSet]:
    """Held-out items for each vector: of the files given, else of the recipe that it names."""
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.recipe import find_recipe

    if data:
        return {name: ContrastSet.from_jsonl(path) for name, path in zip(vectors, data, strict=True)}
    for name, vector in vectors.items():
        if vector.recipe is None:
            raise typer.BadParameter(f"{name} names no recipe to take held-out items from; give --data, one per vector")
    return {name: find_recipe(vector.recipe or "").split()[1] for name, vector in vectors.items()}


def _show(found: Interference, targets: Sequence[Path]) -> None:
    console = stdout()
    shown = table("vector", "vector", "site", "cosine", right=("cosine",))
    for overlap in found.overlaps:
        for site, cosine in overlap.cosines.items():
            shown.add_row(overlap.first, overlap.second, str(site), number(cosine, ".3f"))
        if overlap.note is not None:
            shown.add_row(overlap.first, overlap.second, "none shared", "-")
    console.print(shown)
    for effect in found.effects:
        typer.echo(f"items of {effect.data} ({effect.items}): {effect.column.title}, {effect.column.unit}")
        console.print(_effect_table(effect))
        if effect.interferes:
            none = 1 if effect.column.scale == "log" else 0
            typer.echo(f"not additive: the interval of the interaction leaves out {none}\n")
    for target in targets:
        typer.echo(f"wrote {target}")


def _effect_table(effect: Effect) -> Table:
    """One row for each vector alone, the sum, and all together."""
    kind = "factor" if effect.column.scale == "log" else "change"
    made = table("steered by", kind, "95 % interval", right=(kind, "95 % interval"))
    rows: dict[str, Estimate] = dict(effect.alone)
    rows |= {"sum of these": effect.added, "all together": effect.joint, "interaction": effect.interaction}
    if effect.orthogonal is not None:
        rows["all, orthogonal"] = effect.orthogonal
    for name, estimate in rows.items():
        made.add_row(name, f"{estimate.mean:.3f}", f"{estimate.low:.3f} to {estimate.high:.3f}")
    return made
