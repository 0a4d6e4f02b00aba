"""Ollama's `/api/chat` and `/api/tags`."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from steerkit.serve.body import Fields, asked_model, read_body
from steerkit.serve.engine import Engine
from steerkit.serve.events import Done
from steerkit.serve.openai_routes import streaming
from steerkit.serve.request import Request as Asked
from steerkit.serve.settings import RefusedError, Settings
from steerkit.serve.streams import Stream, while_connected

__all__ = ["ollama_routes", "read_chat"]


def read_chat(fields: Fields, settings: Settings) -> tuple[Asked, bool]:
    """A body of `/api/chat`.

    Args:
        fields: of the body.
        settings: of the server.

    Returns:
        What is asked, and whether it is sent as it comes.

    Raises:
        RefusedError: a field that is wrong, or that cannot be followed.
        SteerError: a value that is out of its range, or no composition.
    """
    messages = fields.messages()
    steering = fields.steering(settings, asked_model(fields.take("model", str), settings))
    options = Fields(fields.take("options", dict, {}))
    longest = options.take("num_predict", int, -1)
    stop = options.take("stop", (str, list), [])
    request = Asked(
        messages,
        steering=steering,
        tools=fields.take("tools", list),
        max_tokens=longest if longest > 0 else None,
        temperature=options.take("temperature", (int, float), 0.8),
        top_p=options.take("top_p", (int, float), 0.9),
        top_k=options.take("top_k", int, 40),
        seed=options.take("seed", int),
        stop=tuple([stop] if isinstance(stop, str) else stop),
    )
    options.unused("num_ctx", lambda _: True, "")
    options.end()
    fields.unused("format", lambda value: value == "", "answers are text")
    fields.unused("think", lambda value: value is False, "thoughts are not parted from answers")
    fields.unused("keep_alive", lambda _: True, "")
    stream = fields.take("stream", bool, True)
    fields.end()
    return request, stream


def ollama_routes(engine: Engine, settings: Settings) -> APIRouter:
    """The routes.

    Args:
        engine: answers.
        settings: of the server.
    """
    routes = APIRouter(prefix="/api")

    @routes.post("/chat")
    async def chat(http: Request) -> Response:
        begun = time.monotonic_ns()
        request, is_streamed = read_chat(await read_body(http, settings.max_body), settings)
        if is_streamed:
            return await streaming(_streamed(engine, request, settings.model, begun), "application/x-ndjson")
        found = await while_connected(http, _whole(engine, request))
        if found is None:
            return Response(status_code=499)
        answer = found[0][0]
        return JSONResponse(_ended(settings.model, answer.text, answer.done, begun))

    @routes.get("/tags")
    async def tags() -> dict[str, Any]:
        names = [settings.model, *(f"{settings.model}+{name}" for name in engine.catalogue.names)]
        return {"models": [{"name": name, "model": name, "modified_at": _now(), "size": 0} for name in names]}

    return routes


async def _whole(engine: Engine, request: Asked) -> Any:
    async with Stream(engine, [request]) as stream:
        return await stream.answers()


async def _streamed(engine: Engine, request: Asked, model: str, begun: int) -> AsyncIterator[str]:
    async with Stream(engine, [request]) as stream:
        yield ""
        try:
            async for _, event in stream.events():
                if isinstance(event, Done):
                    yield _line(_ended(model, "", event, begun))
                elif event.text:
                    yield _line({**_message(model, event.text), "done": False})
        except RefusedError as error:
            yield _line({"error": str(error)})


def _line(data: dict[str, Any]) -> str:
    return json.dumps(data, allow_nan=False) + "\n"


def _message(model: str, text: str) -> dict[str, Any]:
    return {"model": model, "created_at": _now(), "message": {"role": "assistant", "content": text}}


def _ended(model: str, text: str, done: Done, begun: int) -> dict[str, Any]:
    return {
        **_message(model, text),
        "done": True,
        "done_reason": done.finish,
        "total_duration": time.monotonic_ns() - begun,
        "prompt_eval_count": done.prompt_tokens,
        "eval_count": done.tokens,
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()
