"""`/`: the page with two columns. Its files, in `page/`, hold nothing secret, so they are sent without a key."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException, Response

__all__ = ["PAGE", "page_routes"]

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_FILES = {one.name: one for one in sorted(Path(__file__).with_name("page").iterdir()) if one.suffix[1:] in _TYPES}
PAGE = ("/", *(f"/page/{name}" for name in _FILES))
"""The paths of the page."""

_HEADERS = {
    # Nothing but the page's own files, nothing inside another site's page, and nothing sent elsewhere.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.get("/")
    async def page() -> Response:
        return _sent("index.html")

    @routes.get("/page/{name}")
    async def part(name: str) -> Response:
        if name not in _FILES:
            raise HTTPException(404, "the page has no such file")
        return _sent(name)

    return routes


def _sent(name: str) -> Response:
    file = _FILES[name]
    return Response(file.read_bytes(), media_type=_TYPES[file.suffix[1:]], headers=_HEADERS)
