"""Serving: one model, many requests at once, each with its own steering.

`request` is what is asked and `events` what comes back. `engine` runs it: one thread, in which `batch` steps all rows
at once, `row` is one answer, `sampling` draws its tokens, `text_stream` makes them text, `caches` and `prefixes` keep
what has been read. `catalogue` says which vectors requests may name. `app` and what it imports speak HTTP.
"""

from __future__ import annotations

from steerkit.serve.catalogue import Catalogue
from steerkit.serve.engine import Engine, QueueFullError
from steerkit.serve.events import Answer, Done, Piece
from steerkit.serve.request import Request

__all__ = ["Answer", "Catalogue", "Done", "Engine", "Piece", "QueueFullError", "Request"]
