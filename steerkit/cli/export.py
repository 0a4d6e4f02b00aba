"""`steerkit export`: vectors in the format of another program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import typer

from steerkit._support.progress import status
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, DEFAULT_MODEL, ModelChoice, loads_model
from steerkit.cli._shared import Json, comparison, print_json, stdout, table
from steerkit.cli._steering import SteeringOption, check_chosen, chosen

__all__ = ["run"]


class Format(StrEnum):
    """What can be written; one entry of `_WRITERS` each."""

    gguf = "gguf"
    gguf_lora = "gguf-lora"
    svec = "svec"
    peft = "peft"
    hub = "hub"


class _Asked(NamedTuple):
    """What the command line asks for."""

    names: list[str]
    target: Path | None
    strengths: list[float]
    steering: str | None
    scope: str | None
    model: ModelChoice
    force: bool
    repo: str | None
    private: bool
    license: str | None


class _Written(NamedTuple):
    """What a writer tells: where, rows of facts, and how the file is used."""

    target: Path | str
    facts: dict[str, Any]
    usage: str


@loads_model
def run(
    to: Annotated[Format, typer.Option("--to", help="The format to write.")],
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="A vector file, a shipped name, or hub:USER/NAME.")
    ] = None,
    vector: Annotated[list[str] | None, typer.Option(metavar="FILE", help="The same; repeatable for adapters.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where to write. (default: a name of the vector's, here)")
    ] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(help="In the file's unit, one for each vector. (default: the file's suggested strength)"),
    ] = None,
    steering: SteeringOption = None,
    scope: Annotated[str | None, typer.Option(help="all: accept that every token is written.")] = None,
    model: Annotated[
        ModelChoice, f"For adapters alone: alias, hub name, folder or .gguf file. (default: {DEFAULT_MODEL})"
    ] = DEFAULT,
    force: Annotated[bool, typer.Option("--force", help="Replace the file or adapter that stands there.")] = False,
    repo: Annotated[str | None, typer.Option(metavar="USER/NAME", help="For hub alone: the repository.")] = None,
    private: Annotated[bool, typer.Option("--private", help="For hub alone: a new repository is private.")] = False,
    license: Annotated[str | None, typer.Option(metavar="ID", help="For hub alone: such as apache-2.0.")] = None,
    as_json: Json = False,
) -> None:
    """Write vectors in the format of another program, their strength included.

    gguf is llama.cpp's control vector and svec the JSON of AISteer360 and
    hidden-directions, of one vector and without a model; peft is a LoRA
    adapter for --model, gguf-lora one for llama.cpp, of one or several. All
    act at every token, so most vectors need --scope all.
    """
    names = [*([file] if file else []), *(vector or [])]
    if not names and steering is None:
        raise typer.BadParameter("give a vector file or a shipped vector's name, or several with --steering")
    check_chosen(names, strength, steering, scope=scope)
    if to is not Format.hub and (repo or private or license):
        raise typer.BadParameter("--repo, --private and --license go with --to hub")
    asked = _Asked(names, out, strength or [], steering, scope, model, force, repo, private, license)
    written = _WRITERS[to](asked)
    if as_json:
        listed = steering if steering is not None else names if len(names) > 1 else names[0]
        print_json({"file": str(written.target), "format": to.value, "vector": listed, **written.facts})
        return
    console, shown = stdout(), table("", str(written.target))
    for name, value in written.facts.items():
        shown.add_row(name.replace("_", " "), _text(value))
    console.print(shown)
    console.print(written.usage, soft_wrap=True)


def _gguf(asked: _Asked) -> _Written:
    from steerkit.export.gguf import write_control_vector

    return _one_file(asked, "gguf", write_control_vector, "llama-cli -m MODEL.gguf --control-vector {}")


def _svec(asked: _Asked) -> _Written:
    from steerkit.export.svec import write_svec

    return _one_file(asked, "svec", write_svec, "AISteer360: SteeringVector.load({!r})")


def _one_file(asked: _Asked, ending: str, write: Callable[..., Path], usage: str) -> _Written:
    """Write a file of one plain addition, which takes no model."""
    from steerkit._support.shipped import vector_path
    from steerkit.export.plain_addition import added_everywhere
    from steerkit.methods._registry import default_strength
    from steerkit.vector.steering_vector import SteeringVector

    if asked.steering is not None:
        raise typer.BadParameter(f"a .{ending} file holds one vector; give its name, or use --to peft")
    if len(asked.names) > 1:
        raise typer.BadParameter(f"a .{ending} file holds one vector, got {len(asked.names)}")
    if asked.model.is_given:
        given = asked.model.words()[0]
        raise typer.BadParameter(f"a .{ending} file is written without a model; leave {given} out, or use --to peft")
    path = vector_path(asked.names[0])
    target = asked.target or Path(f"{path.stem}.{ending}")
    vector, strength = SteeringVector.load(path).at(scope=asked.scope), next(iter(asked.strengths), None)
    _check_free(target, asked)
    write(vector, target, strength=strength)
    directions = added_everywhere(vector, f".{ending}", strength=strength)
    facts = {
        "strength": default_strength(vector) if strength is None else strength,
        "unit": vector.unit,
        "model_type": vector.model_type,
        "layers": list(directions),
        "norms": [float(direction.norm()) for direction in directions.values()],
    }
    return _Written(target, facts, usage.format(str(target)))


def _check_free(target: Path, asked: _Asked) -> None:
    """Refuse a file that cannot be written, or that stands there, before work is spent on it."""
    from steerkit.errors import VectorFileError

    check_writable(target)
    if target.exists() and not asked.force:
        raise VectorFileError(f"{target}: is there already; choose another name, or replace it with --force")


def _gguf_lora(asked: _Asked) -> _Written:
    from steerkit.export.gguf_lora import write_gguf_lora
    from steerkit.steering.weights import exact_strength

    used = chosen(asked.names, asked.strengths, asked.steering, asked.model.name, scope=asked.scope)
    target = asked.target or Path(f"{Path(used.terms[0].vector).stem}-lora.gguf")
    for one in used.vectors:
        exact_strength(one)
    _check_free(target, asked)
    loaded, tokenizer = asked.model.load()
    with status("comparing with the hooks, and writing the adapter"):
        lora = write_gguf_lora(loaded, tokenizer, used.vectors, target)
    facts = {"rank": lora.rank, "adapts": len(lora.tensors), **comparison(lora.verification)}
    return _Written(target, facts, f"llama-cli -m MODEL.gguf --lora {target}")


def _peft(asked: _Asked) -> _Written:
    from steerkit._support.files import check_folder
    from steerkit.steering.weights import exact_strength

    used = chosen(asked.names, asked.strengths, asked.steering, asked.model.name, scope=asked.scope)
    target = asked.target or Path(f"{Path(used.terms[0].vector).stem}-lora")
    for one in used.vectors:
        exact_strength(one)
    check_folder(target, replace=asked.force)

    from steerkit.export.peft import write_adapter

    loaded, tokenizer = asked.model.load()
    with status("writing the adapter, and comparing it with the hooks"):
        adapter = write_adapter(loaded, tokenizer, used.vectors, target, force=asked.force)
    facts = {
        "rank": adapter.rank,
        "adapts": len(adapter.modules),
        "stored_whole": len(adapter.whole),
        "merges": adapter.merges,
        **comparison(adapter.verification),
    }
    return _Written(target, facts, f'PeftModel.from_pretrained(model, "{target}")')


def _hub(asked: _Asked) -> _Written:
    from steerkit._support.shipped import vector_path
    from steerkit.vector.steering_vector import SteeringVector

    if asked.repo is None:
        raise typer.BadParameter("--to hub needs --repo USER/NAME")
    if "/" not in asked.repo:
        raise typer.BadParameter(f"--repo: {asked.repo}; give USER/NAME")
    said: dict[str, Any] = {
        "--out": asked.target,
        "--strength": asked.strengths,
        "--steering": asked.steering,
        "--scope": asked.scope,
    }
    said |= {"--force": asked.force, "--model": asked.model.is_given}
    if wrong := [option for option, value in said.items() if value]:
        raise typer.BadParameter(f"a vector is uploaded as its file is; leave {wrong[0]} out")
    paths = [vector_path(name) for name in asked.names]
    loaded = [SteeringVector.load(path) for path in paths]
    with status("uploading"):
        pinned = [
            one.push_to_hub(asked.repo, path.stem, private=asked.private or None, license=asked.license)
            for one, path in zip(loaded, paths, strict=True)
        ]
    usage = f'steerkit generate "How was your day?" --vector {pinned[0]}'
    return _Written(f"hub:{asked.repo}", {"pinned": pinned}, usage)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_WRITERS: Mapping[Format, Callable[[_Asked], _Written]] = MappingProxyType(
    {Format.gguf: _gguf, Format.gguf_lora: _gguf_lora, Format.svec: _svec, Format.peft: _peft, Format.hub: _hub}
)
