"""`/steerkit/vectors` and `/steerkit/compare`: what the page with two columns asks for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from steerkit.errors import DataError, StrengthError
from steerkit.methods._read_directions import directions_of
from steerkit.methods._registry import default_strength, resolve
from steerkit.serve.body import Fields, asked_model, read_body
from steerkit.serve.engine import Engine
from steerkit.serve.events import Done, Piece
from steerkit.serve.openai_routes import event, streaming
from steerkit.serve.request import Request as Asked
from steerkit.serve.settings import RefusedError, Settings
from steerkit.serve.streams import Stream
from steerkit.tokens.scope import COUNTED
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["COLUMNS", "read_compare", "steerkit_routes"]

COLUMNS = ("plain", "steered")


def read_compare(fields: Fields, settings: Settings) -> list[Asked]:
    """A body of `/steerkit/compare`.

    Args:
        fields: of the body: a chat's `messages` (one list, or one for each column: ``{"plain": [], "steered": []}``) or
            a `prompt` that is taken as it stands, `steering`, `max_tokens`, `temperature`, `top_p`, `top_k`, `seed`,
            `stop`, `probe`, `chat_template_kwargs`.
        settings: of the server.

    Returns:
        The unsteered request, and the steered one.

    Raises:
        RefusedError: a field that is wrong.
        SteerError: a value that is out of its range, or no composition.
    """
    messages, prompt = fields.take("messages", (list, dict)), fields.take("prompt", str)
    if bool(messages) == bool(prompt):
        raise RefusedError(400, "give messages, or a prompt that is taken as it stands", param="messages")
    steering = fields.steering(settings, asked_model(fields.take("model", str), settings))
    stop = fields.take("stop", (str, list), [])
    common: dict[str, Any] = {
        "max_tokens": fields.take("max_tokens", int),
        "temperature": fields.take("temperature", (int, float), 0.0),
        "top_p": fields.take("top_p", (int, float), 1.0),
        "top_k": fields.take("top_k", int, 0),
        "seed": fields.take("seed", int),
        "stop": tuple([stop] if isinstance(stop, str) else stop),
        "probe": fields.take("probe", str),
        "template": fields.take("chat_template_kwargs", dict, {}),
    }
    fields.end()
    plain, steered = _columns(messages) if isinstance(messages, dict) else [messages or prompt] * 2
    return [Asked(plain, **common), Asked(steered, steering=steering, kl=True, **common)]


def _columns(messages: dict[str, Any]) -> list[Any]:
    """The chat of each column.

    Raises:
        RefusedError: one is missing, or there are others.
    """
    if messages.keys() != set(COLUMNS) or not all(isinstance(one, list) for one in messages.values()):
        raise RefusedError(400, "messages: give a list, or one for each of 'plain' and 'steered'", param="messages")
    return [messages[name] for name in COLUMNS]


def steerkit_routes(engine: Engine, settings: Settings) -> APIRouter:
    """The routes.

    Args:
        engine: answers.
        settings: of the server.
    """
    routes = APIRouter(prefix="/steerkit")

    @routes.get("/vectors")
    async def vectors() -> dict[str, Any]:
        listed = await asyncio.to_thread(_listed, engine)
        default = None if settings.default is None else settings.default.as_json()
        return {"model": settings.model, "default": default, "vectors": listed}

    @routes.post("/compare")
    async def compare(http: Request) -> Response:
        requests = read_compare(await read_body(http, settings.max_body), settings)
        return await streaming(_compared(engine, requests))

    return routes


def _listed(engine: Engine) -> list[dict[str, Any]]:
    return [_facts(name, engine.catalogue.vector(name)) for name in engine.catalogue.names]


def _facts(name: str, vector: SteeringVector) -> dict[str, Any]:
    """What people choose a vector by.

    `strength` is the one taken where none is given, null where one has to be; `ladder` has strengths from weak to
    strong; `scopes` are those that need no number.
    """
    method = resolve(vector.method)
    try:
        strength: float | None = default_strength(vector)
    except StrengthError:
        strength = None
    return {
        "name": name,
        "method": vector.method,
        "strength": strength,
        "ladder": method.ladder,
        "counts": method.strength_unit,
        "unit": vector.unit,
        "scope": vector.scope,
        "scopes": [one for one in method.scopes if one not in COUNTED],
        "is_probe": _is_probe(vector),
        "layers": sorted({site.layer for site in vector.sites}),
    }


def _is_probe(vector: SteeringVector) -> bool:
    """Whether it has a direction that is read."""
    try:
        directions_of(vector, None)
    except DataError:
        return False
    return True


async def _compared(engine: Engine, requests: list[Asked]) -> AsyncIterator[str]:
    """The events of both columns as they come, and at the end how each ended."""
    ends: dict[str, dict[str, Any]] = {}
    async with Stream(engine, requests) as stream:
        yield ""
        try:
            async for place, found in stream.events():
                if isinstance(found, Done):
                    ends[COLUMNS[place]] = {
                        "finish": found.finish,
                        "tokens": found.tokens,
                        "prompt_tokens": found.prompt_tokens,
                    }
                else:
                    yield event(_piece(COLUMNS[place], found))
            yield event({"done": ends})
        except RefusedError as error:
            yield event(error.as_json())


def _piece(column: str, piece: Piece) -> dict[str, Any]:
    token = piece.tokens[0] if piece.tokens else None
    told = {"kl": None, "reading": None} if token is None else {"kl": token.kl, "reading": token.reading}
    return {"column": column, "text": piece.text, **told}
