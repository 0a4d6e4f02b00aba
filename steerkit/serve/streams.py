"""`Stream`: the events of requests in asyncio, and their end when whoever asked is gone."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from steerkit.serve.engine import Engine
from steerkit.serve.events import Answer, Done, Event, gathered
from steerkit.serve.request import Request
from steerkit.serve.row import Ticket
from steerkit.serve.settings import RefusedError

if TYPE_CHECKING:
    from fastapi import Request as HttpRequest

__all__ = ["Stream", "while_connected"]

T = TypeVar("T")


class Stream:
    """Requests that run together, as an async context manager: what is left of them is cancelled at its end.

    Args:
        engine: runs them.
        requests: what is asked.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine, self._requests = engine, tuple(requests)
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._is_closed = False

    async def __aenter__(self) -> Stream:
        """Have all requests taken and planned.

        Raises:
            SteerError: one of them cannot be; none of the others runs then.
        """
        loop = asyncio.get_running_loop()

        def emit(place: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self._events.put_nowait, (place, event))

        asked = [(request, functools.partial(emit, place)) for place, request in enumerate(self._requests)]
        try:
            # Long prompts take a while to be read; whoever is gone meanwhile leaves no request behind.
            taken = asyncio.ensure_future(asyncio.to_thread(self._engine.submit, *asked))
            taken.add_done_callback(self._take)
            await asyncio.shield(taken)
            for ticket in self._tickets:
                await asyncio.wrap_future(ticket.planned)
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, taken: asyncio.Future[list[Ticket]]) -> None:
        """Keep the tickets of what was asked; a stream that was closed meanwhile gives them back."""
        if not taken.cancelled() and taken.exception() is None:
            self._tickets = taken.result()
            if self._is_closed:
                self.close()

    def close(self) -> None:
        """Cancel what has not ended."""
        self._is_closed = True
        for ticket in self._tickets:
            if ticket.open:
                self._engine.cancel(ticket)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Each event with the number of its request, until all answers have ended.

        Yields:
            As they come.

        Raises:
            RefusedError: an answer ended with an error, or because the server ends.
        """
        left = sum(request.n for request in self._requests)
        while left:
            place, event = await self._events.get()
            if isinstance(event, Done):
                left -= 1
                if event.finish == "error":
                    raise RefusedError(500, event.error or "the answer failed", code="generation_failed")
                if event.finish == "cancelled":
                    raise RefusedError(503, "the server is ending; try again later", code="unavailable")
            yield place, event

    async def answers(self) -> list[list[Answer]]:
        """All answers of each request, whole.

        Raises:
            RefusedError: see `events`.
        """
        found: list[list[Event]] = [[] for _ in self._requests]
        async for place, event in self.events():
            found[place].append(event)
        return [gathered(events) for events in found]


async def while_connected(http: HttpRequest, work: Any) -> Any:
    """Wait for something as long as whoever asked is there.

    Args:
        http: the request, whose body has been read.
        work: a coroutine; it is cancelled when the connection ends.

    Returns:
        What it gives; None where nobody is there any more.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await one


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
