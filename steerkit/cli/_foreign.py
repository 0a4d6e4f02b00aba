"""Files of other programs as `inspect` shows them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from steerkit.cli._shared import number, print_json, stdout, table

if TYPE_CHECKING:
    from steerkit.vector.foreign.directions import Directions

__all__ = ["is_foreign", "show_foreign"]


def is_foreign(path: Path) -> bool:
    """Whether a file can be imported, and is no vector of steerkit's.

    Args:
        path: of any file.

    Raises:
        VectorFileError: there is no such file.
    """
    from steerkit.vector.foreign.kinds import Kind, kind_of
    from steerkit.vector.vector_files import read_vector_file

    data = read_vector_file(path)
    kind = kind_of(data)
    if kind is not Kind.SAFETENSORS:
        return kind is not None and kind.can_be_imported
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__") or {}
    except (ValueError, AttributeError, RecursionError):
        return False  # damaged: the strict reader says how
    return bool(header.keys() - {"__metadata__"}) and not {"method", "layer_counting"} & set(metadata)


def show_foreign(path: Path, *, as_json: bool) -> None:
    """Print what such a file holds, and how to import it.

    Args:
        path: of the file.
        as_json: as JSON.

    Raises:
        VectorFileError: it is damaged, or holds something else.
    """
    from steerkit.vector.foreign.importing import read_foreign

    found = read_foreign(path)
    usage = f"steerkit import {shlex.quote(str(path))} --model MODEL --out v.safetensors{_more(found)}"
    listed = {f"resid_post.{layer}": value for layer, value in found.by_layer.items()} | dict(found.loose)
    if as_json:
        shown = [
            {"name": name, "shape": list(value.shape), "norm": float(value.norm())} for name, value in listed.items()
        ]
        facts = {"file": str(path), "kind": found.kind.value, "model_type": found.model_type, "directions": shown}
        print_json({**facts, "import": usage})
        return
    rows = table("direction", "shape", "norm", right=("norm",))
    for name, value in listed.items():
        rows.add_row(name, " x ".join(map(str, value.shape)), number(float(value.norm())))
    named = "" if found.model_type is None else f", made for {found.model_type}"
    typer.echo(f"{path}: {found.kind.value}{named}")
    stdout().print(rows)
    typer.echo(f"import it:\n  {usage}")


def _more(found: Directions) -> str:
    """The option that an import needs beside the model."""
    if found.by_layer:
        return ""
    return " --tensor NAME --layers N" if len(found.loose) > 1 else " --layers N"
