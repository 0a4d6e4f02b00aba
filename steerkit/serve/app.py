"""The server as a FastAPI application: its routes, who may ask, and errors in OpenAI's form."""

from __future__ import annotations

import hmac
import logging
import time
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException as RoutingError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steerkit.errors import SteerError
from steerkit.serve.engine import Engine, QueueFullError
from steerkit.serve.metrics import Metrics
from steerkit.serve.ollama_routes import ollama_routes
from steerkit.serve.openai_routes import openai_routes
from steerkit.serve.page_routes import PAGE, page_routes
from steerkit.serve.settings import RefusedError, Settings
from steerkit.serve.steerkit_routes import steerkit_routes

__all__ = ["PUBLIC", "make_app"]

logger = logging.getLogger(__name__)

PUBLIC = ("/health", *PAGE)
"""What is answered without a key."""
_LOCAL = ("localhost", "127.0.0.1", "::1", "testserver")


def make_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application.

    Args:
        engine: answers requests; it is closed by whoever made it.
        settings: of the server.
    """
    app = FastAPI(title="steerkit", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics(engine)

    app.add_middleware(_Guard, settings=settings, metrics=metrics)

    @app.exception_handler(SteerError)
    async def refused(http: Request, error: SteerError) -> Response:
        return _answer(http, _as_refused(error))

    @app.exception_handler(RoutingError)
    async def routing(http: Request, error: HTTPException) -> Response:
        return _answer(http, RefusedError(error.status_code, f"{http.method} {http.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def failed(http: Request, error: Exception) -> Response:
        logger.error("a request failed", exc_info=error)
        return _answer(http, RefusedError(500, f"the server failed ({type(error).__name__})"))

    @app.get("/health")
    async def health() -> Response:
        alive = engine.is_alive
        return JSONResponse({"status": "ok" if alive else "ended"}, status_code=200 if alive else 503)

    @app.get("/metrics")
    async def measured() -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    app.include_router(openai_routes(engine, settings, int(time.time())))
    app.include_router(ollama_routes(engine, settings))
    app.include_router(steerkit_routes(engine, settings))
    app.include_router(page_routes())
    return app


class _Guard:
    """Lets requests in, and counts how they were answered. Plain ASGI, so that streams and their ends pass through."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count(message["status"])
            await send(message)

        http = Request(scope)
        try:
            _check_origin(http, self._settings)
            _check_key(http, self._settings)
        except RefusedError as error:
            await _answer(http, error)(scope, receive, counted)
            return
        await self._app(scope, receive, counted)


def _as_refused(error: SteerError) -> RefusedError:
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, QueueFullError):
        return RefusedError(429, str(error), code="queue_full")
    return RefusedError(400, str(error))


def _answer(http: Request, error: RefusedError) -> Response:
    """An error in the form of the protocol that was spoken."""
    body = {"error": str(error)} if http.url.path.startswith("/api/") else error.as_json()
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return JSONResponse(body, status_code=error.status, headers=headers)


def _check_key(http: Request, settings: Settings) -> None:
    """Refuse whoever does not bring the key; how long that takes does not tell how much of it was right."""
    if settings.api_key is None or http.url.path in PUBLIC:
        return
    kind, _, key = http.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(key.encode("latin-1"), settings.api_key.encode()):
        raise RefusedError(401, "the key is missing or wrong; send 'Authorization: Bearer KEY'", code="invalid_api_key")


def _check_origin(http: Request, settings: Settings) -> None:
    """Refuse pages of other sites: a browser on this machine would reach the server for them."""
    host, origin = http.headers.get("host", ""), http.headers.get("origin")
    if settings.local and urlsplit(f"//{host}").hostname not in _LOCAL:
        raise RefusedError(403, f"host {host[:60]!r} is not this server; use localhost")
    if origin is not None and urlsplit(origin).netloc != host:
        raise RefusedError(403, f"a page of {origin[:60]!r} may not ask this server")
