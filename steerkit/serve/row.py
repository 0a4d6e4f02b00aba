"""`Row`: one answer while it is generated, and `Ticket`: the request that it belongs to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from steerkit.serve.events import Done, Event, Finish, Piece, Token
from steerkit.serve.sampling import Sampler
from steerkit.serve.text_stream import TextStream

if TYPE_CHECKING:
    from steerkit.serve.probe import Probe
    from steerkit.serve.request import Request
    from steerkit.steering.row_plans import PlannedRow
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Row", "Ticket"]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Ticket:
    """A request that was taken.

    Attributes:
        request: what was asked.
        vectors: that steer it.
        ids: of the prompt.
        limit: the longest answer, in tokens.
        emit: called with each event, in the engine's thread; it may not block.
        planned: done when all about the request has been checked; raises what is wrong with it.
        open: answers that have not ended.
        is_cancelled: whether nobody waits for it any more.
    """

    request: Request
    vectors: Sequence[SteeringVector]
    ids: tuple[int, ...]
    limit: int
    emit: Callable[[Event], object]
    planned: Future[None] = field(default_factory=Future)
    open: int = 0
    is_cancelled: bool = False


class Row:
    """One answer.

    Args:
        ticket: the request.
        choice: which of its answers.
        steering: of this row.
        decode: from ids to text.
        ends: ids that end an answer.
        probe: what is read in it; None for nothing.
        leader: the row whose tokens this one reads instead of choosing its own; it ends with it and tells nothing.

    Attributes:
        ids: prompt and answer so far.
        cached: how many of the prompt's tokens had been read before.
        finish: how it ended; None while it goes on.
    """

    def __init__(
        self,
        ticket: Ticket,
        choice: int,
        steering: PlannedRow,
        *,
        decode: Callable[[Sequence[int]], str],
        ends: frozenset[int],
        probe: Probe | None = None,
        leader: Row | None = None,
    ) -> None:
        self.ticket, self.choice, self.steering, self.probe, self.leader = ticket, choice, steering, probe, leader
        self.ids, self.prompt_length, self.cached = list(ticket.ids), len(ticket.ids), 0
        self.sampler = Sampler(ticket.request, choice)
        self.finish: Finish | None = None
        self._ends = ends
        self._stream = TextStream(decode, ticket.request.stop)

    @property
    def generated(self) -> int:
        """How many tokens it has chosen."""
        return len(self.ids) - self.prompt_length

    def take(self, token: Token) -> None:
        """Go on with a token that was chosen, and tell of it.

        Args:
            token: the next one.
        """
        if self.leader is not None:
            self.ids.append(token.id)
            return
        if token.id in self._ends:
            self.ids.append(token.id)
            self.end("stop")
            return
        self.ids.append(token.id)
        self._tell(Piece(self.choice, self._stream.add(token.id), (token,)))
        if self._stream.is_stopped:
            self.end("stop")
        elif self.generated >= self.ticket.limit:
            self.end("length")

    def end(self, finish: Finish, error: str | None = None) -> None:
        """End the answer, once.

        Args:
            finish: how.
            error: what went wrong.
        """
        if self.finish is not None:
            return
        self.finish = finish
        if self.leader is not None:
            return
        rest = self._stream.close() if finish in ("stop", "length") else ""
        if rest:
            self._tell(Piece(self.choice, rest))
        self.ticket.open -= 1
        self._tell(Done(self.choice, finish, self.prompt_length, self.cached, self.generated, error))

    def _tell(self, event: Event) -> None:
        """Hand an event to whoever waits; a request whose reader has failed is cancelled."""
        if self.ticket.is_cancelled and not isinstance(event, Done):
            return
        try:
            self.ticket.emit(event)
        except Exception:
            logger.warning("nobody takes the events of a request any more; it is cancelled", exc_info=True)
            self.ticket.is_cancelled = True
