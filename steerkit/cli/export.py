"""`steerkit export`: a vector as a file of another program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from steerkit.cli._files import check_writable
from steerkit.cli._shared import Json, print_json, stdout, table

if TYPE_CHECKING:
    from steerkit.vector import SteeringVector

__all__ = ["run"]


class Format(StrEnum):
    """What can be written; one entry of `_WRITERS` each."""

    gguf = "gguf"


class _Written(NamedTuple):
    """What a writer tells: rows of facts, and how the file is used."""

    facts: dict[str, Any]
    usage: str


def run(
    vector: Annotated[str, typer.Argument(metavar="FILE", help="A vector file, or a shipped vector's name.")],
    to: Annotated[Format, typer.Option("--to", help="The format to write.")],
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where to write. (default: <vector>.<format>, here)")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="In the file's unit. (default: the file's suggested strength, else 1)")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="all: accept that every token is written.")] = None,
    as_json: Json = False,
) -> None:
    """Write a vector as a file of another program, its strength included.

    gguf is llama.cpp's control vector; it adds at every token, so most vectors need --scope all.
    """
    from steerkit.shipped import vector_path
    from steerkit.vector import SteeringVector

    path = vector_path(vector)
    target = out or Path(f"{path.stem}.{to.value}")
    loaded = SteeringVector.load(path).at(scope=scope)
    check_writable(target)
    written = _WRITERS[to](loaded, target, strength)
    if as_json:
        print_json({"file": str(target), "format": to.value, "vector": str(path), **written.facts})
        return
    console, shown = stdout(), table("", str(target))
    for name, value in written.facts.items():
        shown.add_row(name.replace("_", " "), _text(value))
    console.print(shown)
    console.print(written.usage, soft_wrap=True)


def _gguf(vector: SteeringVector, target: Path, strength: float | None) -> _Written:
    from steerkit.export.gguf import control_vector, write_control_vector
    from steerkit.registry import default_strength

    directions = control_vector(vector, strength=strength)
    write_control_vector(vector, target, strength=strength)
    facts = {
        "strength": default_strength(vector) if strength is None else strength,
        "unit": vector.unit,
        "model_type": vector.model_type,
        "layers": list(directions),
        "norms": [float(direction.norm()) for direction in directions.values()],
    }
    return _Written(facts, f"llama-cli -m MODEL.gguf --control-vector {target}")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_Writer = Callable[["SteeringVector", Path, float | None], _Written]
_WRITERS: Mapping[Format, _Writer] = MappingProxyType({Format.gguf: _gguf})
