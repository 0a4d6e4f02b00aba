"""`/v1/chat/completions`, `/v1/completions` and `/v1/models`."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from steerkit.serve.body import Fields, asked_model, read_body
from steerkit.serve.engine import Engine
from steerkit.serve.events import Done
from steerkit.serve.openai_form import Asked, OpenAIForm, read_chat, read_completion
from steerkit.serve.settings import RefusedError, Settings
from steerkit.serve.streams import Stream, while_connected

__all__ = ["event", "openai_routes", "streaming"]

EVENTS = "text/event-stream"


def event(data: Any) -> str:
    """One server-sent event.

    Args:
        data: as JSON can hold it.
    """
    return f"data: {json.dumps(data, allow_nan=False)}\n\n"


def openai_routes(engine: Engine, settings: Settings, started: int) -> APIRouter:
    """The routes.

    Args:
        engine: answers.
        settings: of the server.
        started: when the server began, in seconds of Unix.
    """
    routes = APIRouter(prefix="/v1")
    text = functools.lru_cache(maxsize=4096)(engine.text_of)

    async def respond(http: Request, read: Callable[[Fields, Settings], Asked], *, is_chat: bool) -> Response:
        asked = read(await read_body(http, settings.max_body), settings)
        form = OpenAIForm(settings.model, asked, is_chat=is_chat, vocabulary=text)
        if not asked.stream:
            answers = await while_connected(http, _whole(engine, asked))
            return Response(status_code=499) if answers is None else JSONResponse(form.whole(answers))
        return await streaming(_streamed(engine, asked, form))

    @routes.post("/chat/completions")
    async def chat(http: Request) -> Response:
        return await respond(http, read_chat, is_chat=True)

    @routes.post("/completions")
    async def completions(http: Request) -> Response:
        return await respond(http, read_completion, is_chat=False)

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        steered = [f"{settings.model}+{name}" for name in engine.catalogue.names]
        listed = [_model(name, started) for name in (settings.model, *steered)]
        return {"object": "list", "data": listed}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        asked_model(name, settings)
        return _model(name, started)

    return routes


def _model(name: str, started: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": started, "owned_by": "steerkit"}


async def _whole(engine: Engine, asked: Asked) -> Any:
    async with Stream(engine, asked.requests) as stream:
        return await stream.answers()


async def streaming(pieces: AsyncIterator[str], media_type: str = EVENTS) -> Response:
    """A response that is sent as it comes.

    Args:
        pieces: a generator whose first piece is empty: it comes when nothing can be wrong with the request any more, so
            that errors are answered with their status. It is under way then, and so ends what it runs in any case.
        media_type: of the response.
    """
    await anext(pieces)
    return StreamingResponse(pieces, media_type=media_type)


async def _streamed(engine: Engine, asked: Asked, form: OpenAIForm) -> AsyncIterator[str]:
    """The events of a stream; what is left is cancelled when its reader is gone."""
    dones: list[list[Done]] = [[] for _ in asked.requests]
    async with Stream(engine, asked.requests) as stream:
        yield ""
        try:
            for one in form.begin():
                yield event(one)
            async for place, found in stream.events():
                if isinstance(found, Done):
                    dones[place].append(found)
                    yield event(form.end(place, found))
                elif (piece := form.piece(place, found)) is not None:
                    yield event(piece)
            if asked.usage:
                yield event(form.usage(dones))
        except RefusedError as error:
            yield event(error.as_json())
        yield "data: [DONE]\n\n"
