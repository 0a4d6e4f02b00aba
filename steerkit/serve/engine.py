"""`Engine`: one model, one thread, many requests at once.

Requests are taken from any thread and wait in a line. Between two steps the engine's thread reads the prompts of those
it has room for, joins them to the rows under way, and lets go those that have ended; then all rows take a step, in one
pass, each under its own steering.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from torch import nn

from steerkit.errors import DataError, ModelError, SteerError
from steerkit.network.context import context_of
from steerkit.serve.catalogue import Catalogue
from steerkit.serve.events import Answer, Done, Event, gathered
from steerkit.serve.prompt import PromptReader
from steerkit.serve.request import Request
from steerkit.serve.row import Row, Ticket
from steerkit.serve.worker import Worker, end_rows
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Engine", "QueueFullError"]


class QueueFullError(SteerError):
    """Too many requests wait already."""


class Engine:
    """Answers requests.

    Args:
        model: any decoder-only transformers model; nobody else runs or steers it meanwhile.
        tokenizer: its tokenizer; never changed.
        catalogue: the vectors that requests may name; None for none.
        max_batch: rows under way at most. An answer takes one row, and one more where its `kl` is asked for.
        max_queue: rows that wait at most.
        max_tokens: the longest answer.
        prefix_bytes: room for what was read of earlier texts; 0 keeps nothing.

    Attributes:
        worker: what runs the rows, in the engine's thread.
        context: how many tokens the model takes; None where nothing limits them.

    Raises:
        SteerError: the model cannot be steered, or not be run step by step.

    Example:
        with Engine(model, tokenizer, Catalogue({"optimism": vector})) as engine:
            (answer,) = engine.answers(Request([{"role": "user", "content": "Hi"}], steering="optimism*1.5"))
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        catalogue: Catalogue | None = None,
        *,
        max_batch: int = 16,
        max_queue: int = 64,
        max_tokens: int = 1024,
        prefix_bytes: int = 512 * 2**20,
    ) -> None:
        self.catalogue = catalogue or Catalogue()
        self.max_batch, self.max_queue, self.max_tokens = max_batch, max_queue, max_tokens
        self.worker = Worker(model, tokenizer, self.catalogue, max_batch=max_batch, prefix_bytes=prefix_bytes)
        context = context_of(self.worker.passes.decoder)
        self.context = None if context is None else context.tokens
        inner: Any = self.worker.passes.decoder.model
        self._prompts = PromptReader(tokenizer, inner.get_input_embeddings().num_embeddings)
        self._new: deque[Ticket] = deque()
        self._line: deque[list[Row]] = deque()
        self._wake = threading.Condition()
        self._is_closed = False
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, args=(started,), name="steerkit-engine", daemon=True)
        self._thread.start()
        started.result()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._is_closed

    @property
    def running(self) -> int:
        """Rows under way."""
        return self.worker.running

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return sum(map(len, list(self._line))) + sum(_rows_of(one.request) for one in list(self._new))

    def submit(self, *asked: tuple[Request, Callable[[Event], object]]) -> list[Ticket]:
        """Take requests, all or none; those that are taken together begin in one pass where there is room.

        Args:
            asked: each request with what is called with its events, in the engine's thread; it may not block.

        Returns:
            Their tickets. `ticket.planned` tells whether a request's steering can be had, before anything is generated;
            where it cannot, no event comes.

        Raises:
            QueueFullError: too many requests wait.
            DataError: no prompt, one that is too long, or more answers than run at once.
            SteerError: a prompt that cannot be rendered, or a vector that cannot be had.
            ModelError: the engine is closed.
        """
        tickets = [self._ticket(request, emit) for request, emit in asked]
        rows = sum(_rows_of(request) for request, _ in asked)
        with self._wake:
            if self._is_closed:
                raise ModelError("the engine is closed")
            if self.waiting + rows > self.max_queue:
                raise QueueFullError(
                    f"{self.waiting} answers wait already, of at most {self.max_queue}; try again later"
                )
            self._new += tickets
            self._wake.notify()
        return tickets

    def _ticket(self, request: Request, emit: Callable[[Event], object]) -> Ticket:
        """All that can be known of a request without the model.

        Raises:
            DataError: more answers than run at once.
        """
        if _rows_of(request) > self.max_batch:
            raise DataError(
                f"n: {request.n} answers take {_rows_of(request)} rows, and at most {self.max_batch} run at once"
            )
        vectors = self._vectors(request)
        ids = self._prompts.ids(request, vectors)
        return Ticket(request, vectors, ids, self._limit(request, len(ids)), emit, open=request.n)

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request; its rows go before the next step. One that has ended stays as it is.

        Args:
            ticket: what `submit` gave.
        """
        with self._wake:
            ticket.is_cancelled = True
            self._wake.notify()

    def answers(self, request: Request) -> list[Answer]:
        """Answer a request and wait for it.

        Args:
            request: what is asked.

        Returns:
            All of its answers, whole.

        Raises:
            SteerError: see `submit`, and what its steering meets.
        """
        events: SimpleQueue[Event] = SimpleQueue()
        (ticket,) = self.submit((request, events.put))
        try:
            ticket.planned.result()
            found: list[Event] = []
            while sum(isinstance(event, Done) for event in found) < request.n:
                found.append(events.get())
        except BaseException:
            self.cancel(ticket)
            raise
        return gathered(found)

    def text_of(self, token: int) -> str:
        """What a token stands for, special ones included.

        Args:
            token: its id.
        """
        return self._prompts.text_of(token)

    def close(self) -> None:
        """End all requests and the thread; the model is left as it was."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def _vectors(self, request: Request) -> list[SteeringVector]:
        given: Any = request.steering
        if given is None:
            return []
        return list(given) if isinstance(given, list | tuple) else self.catalogue.vectors(given)

    def _limit(self, request: Request, prompt: int) -> int:
        """How long the answer may be.

        Raises:
            DataError: there is no room for it.
        """
        wanted = self.max_tokens if request.max_tokens is None else request.max_tokens
        if wanted > self.max_tokens:
            raise DataError(f"max_tokens: got {wanted}; answers have at most {self.max_tokens} here")
        if self.context is None:
            return wanted
        room = self.context - prompt + 1  # the last token is never read
        if room < 1 or (request.max_tokens is not None and room < wanted):
            raise DataError(
                f"the prompt has {prompt} tokens and the answer up to {wanted}, and the model takes {self.context}; "
                "shorten the prompt or ask for less"
            )
        return min(wanted, room)

    def _work(self, started: Future[None]) -> None:
        """The engine's thread."""
        try:
            self.worker.begin()
        except BaseException as error:  # noqa: BLE001 - whoever makes the engine gets it
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            while self._wait():
                self._plan_new()
                self.worker.admit(self._line)
                self.worker.step()
        finally:
            self._end_all()

    def _wait(self) -> bool:
        """Wait until there is something to do; False when the engine is closed."""
        with self._wake:
            while not (self._is_closed or self._new or self._line or self.running):
                self.worker.passes.release()
                self._wake.wait()
            return not self._is_closed

    def _plan_new(self) -> None:
        """Plan the steering of new requests, and put their rows in the line."""
        while self._new:
            ticket = self._new[0]
            groups: list[list[Row]] = []
            if ticket.planned.set_running_or_notify_cancel():  # else nobody waits any more
                try:
                    groups = self.worker.plan(ticket)
                    ticket.planned.set_result(None)
                except Exception as error:  # noqa: BLE001 - whoever asked gets it
                    ticket.planned.set_exception(error)
            self._line.extend(groups)
            self._new.popleft()

    def _end_all(self) -> None:
        """Tell everybody that it is over."""
        with self._wake:
            self._is_closed = True
            for ticket in self._new:
                if ticket.planned.set_running_or_notify_cancel():
                    ticket.planned.set_exception(ModelError("the engine is closed"))
            rows = [row for group in self._line for row in group]
            self._new.clear()
            self._line.clear()
        end_rows(rows, "cancelled")
        self.worker.close()


def _rows_of(request: Request) -> int:
    """How many rows a request takes."""
    return request.n * (1 + request.kl)
