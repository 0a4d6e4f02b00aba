"""`steerkit merge`: what finetuning has changed, added to a checkpoint or taken away from it, on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from steerkit._support.progress import status
from steerkit.cli._shared import Json, print_json, stdout

__all__ = ["run"]

BaseArgument = Annotated[
    str, typer.Argument(metavar="BASE", help="What the finetuned models were made of: folder, alias or hub name.")
]
TunedOption = Annotated[
    list[str],
    typer.Option(metavar="MODEL", help="A model finetuned from BASE, or the folder of a LoRA; repeatable."),
]
ScaleOption = Annotated[
    list[float] | None,
    typer.Option(help="One for each --tuned: what its change is multiplied by; below 0 takes it away. (default: 1)"),
]
ShardOption = Annotated[
    float, typer.Option("--shard-gb", min=0.001, help="The size at which a new file begins, in GB.")
]


def run(
    base: BaseArgument,
    tuned: TunedOption,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    scale: ScaleOption = None,
    shard_gb: ShardOption = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that stands there.")] = False,
    as_json: Json = False,
) -> None:
    """Write BASE with the changes of finetuned models: added, scaled, taken away, several together.

    Weights are read, changed and written some rows at a time, so that a checkpoint may be larger than memory; the same
    command goes on where a killed one stopped. C + (B - A) is --tuned C --tuned B --tuned A --scale 1 --scale 1
    --scale -1.
    """
    scales = scale or [1.0] * len(tuned)
    if len(scales) != len(tuned):
        raise typer.BadParameter(
            f"got {len(scales)} of --scale for {len(tuned)} of --tuned; give one for each, or none"
        )

    from steerkit import tuning
    from steerkit._support.files import check_folder

    check_folder(out.expanduser(), replace=force)
    with status("writing the checkpoint"):
        parts = [tuning.TaskVector.between(base, one) * factor for one, factor in zip(tuned, scales, strict=True)]
        vector = sum(parts[1:], parts[0])
        found = tuning.merge(base, vector, out, force=force, shard_bytes=int(shard_gb * 1e9))
    facts: dict[str, Any] = {
        "folder": str(out),
        "changed": len(found.changed),
        "kept": found.kept,
        "files": len(found.digests),
        "resumed": found.resumed,
        "left_out": vector.left_out,
    }
    if as_json:
        print_json({"base": base, "tuned": dict(zip(tuned, scales, strict=True)), **facts})
        return
    console = stdout()
    again = f", {found.resumed} of them from a run that was stopped" if found.resumed else ""
    console.print(f"{len(found.changed)} tensors changed, {found.kept} as they were, {len(found.digests)} files{again}")
    if vector.left_out:
        tensor, why = next(iter(vector.left_out.items()))
        console.print(f"left out: {len(vector.left_out)}, such as {tensor}: {why}")
    console.print(f"wrote {out}")
