"""`steerkit serve`: a server for OpenAI's and Ollama's clients, steered request by request."""

from __future__ import annotations

import json
import urllib.request
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.progress import status
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import Json, print_json
from steerkit.cli._steering import SteeringOption

if TYPE_CHECKING:
    from steerkit.serve.engine import Engine
    from steerkit.serve.settings import Settings

__all__ = ["run"]

VectorOption = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="A vector that requests may name, beside those shipped for the model; repeat."),
]
KeyOption = Annotated[
    str | None, typer.Option(envvar="STEERKIT_API_KEY", metavar="KEY", help="What requests have to bring.")
]
NameOption = Annotated[str | None, typer.Option(help="What requests call the model. (default: as in --model)")]
QueueOption = Annotated[int, typer.Option(min=1, help="Answers that wait at most; more are refused (429).")]
PrefixOption = Annotated[int, typer.Option(min=0, metavar="MIB", help="Room for what was read of earlier turns.")]


@loads_model
def run(
    vector: VectorOption = None,
    steering: SteeringOption = None,
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine's need --api-key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    api_key: KeyOption = None,
    name: NameOption = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that are generated at once.")] = 16,
    max_queue: QueueOption = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 1024,
    prefix_cache: PrefixOption = 512,
    check: Annotated[bool, typer.Option("--check", help="Answer one request, and end.")] = False,
    model: ModelChoice = DEFAULT,
    as_json: Json = False,
) -> None:
    """Serve a model to OpenAI's and Ollama's clients, each request with its own steering.

    --steering is for requests that say nothing of it. Needs the extra serve of steerkit-hf.
    """
    from steerkit.serve.running import bound, check_extra, is_local

    check_extra()
    if not is_local(host) and not api_key:
        raise typer.BadParameter(f"--host {host} is reached from other machines; give an --api-key too")
    if api_key == "":
        raise typer.BadParameter("--api-key is empty; give one, or leave it out")

    from steerkit.cli._steering import composition_of
    from steerkit.serve.catalogue import Catalogue
    from steerkit.serve.engine import Engine
    from steerkit.serve.settings import Settings

    default = None if steering is None else composition_of(steering)
    catalogue = Catalogue(allowed=vector or (), model=model.name)
    if default is not None:
        catalogue.vectors(default)
    called = name or model.name.rstrip("/").rpartition("/")[2]
    settings = Settings(called, default, api_key, local=is_local(host))
    with bound(host, port) as listening:
        loaded, tokenizer = model.load()
        with status("starting"):
            engine = Engine(
                loaded,
                tokenizer,
                catalogue,
                max_batch=max_batch,
                max_queue=max_queue,
                max_tokens=max_tokens,
                prefix_bytes=prefix_cache * 2**20,
            )
        with engine:
            _serve(engine, settings, listening, check=check, as_json=as_json)


def _serve(engine: Engine, settings: Settings, listening: Any, *, check: bool, as_json: bool) -> None:
    """Serve until Ctrl-C; or answer one request."""
    from steerkit.serve.running import make_server, running

    if check:
        with running(engine, settings, listening) as address:
            answer = _asked(address, settings)
        if as_json:
            print_json({"model": settings.model, "address": address, "answer": answer})
        else:
            typer.echo(answer)
        return
    say = _say_json if as_json else _say
    try:
        make_server(engine, settings, listening, lambda address: say(address, settings)).run(sockets=[listening])
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)


def _say(address: str, settings: Settings) -> None:
    """Where it is, one line that tries it, and the page."""
    key = "" if settings.api_key is None else '-H "Authorization: Bearer $STEERKIT_API_KEY" '
    body = json.dumps({"messages": [{"role": "user", "content": "How was your day?"}], "max_tokens": 40})
    typer.echo(f"{settings.model} at {address}/v1")
    typer.echo(f"curl {address}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{body}'")
    typer.echo(f"in a browser: {address}")


def _say_json(address: str, settings: Settings) -> None:
    print_json({"model": settings.model, "address": address})


def _asked(address: str, settings: Settings) -> str:
    """What the server answers to one request."""
    body = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    if settings.api_key is not None:
        headers["Authorization"] = f"Bearer {settings.api_key}"
    asked = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked) as answer:
        return str(json.load(answer)["choices"][0]["text"])
