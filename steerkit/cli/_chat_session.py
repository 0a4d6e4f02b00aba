"""`Chat`: a conversation with a steered model, beside the plain one where that is wanted. It knows no terminal."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from steerkit._support.files import write_whole
from steerkit.errors import SteerError

if TYPE_CHECKING:
    from steerkit.composition.terms import Composition
    from steerkit.serve import Answer, Engine, Request
    from steerkit.serve.events import Event
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["PLAIN", "STEERED", "Answering", "Chat", "Sampling", "Turn"]

PLAIN, STEERED = "plain", "steered"
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        seed: of drawn tokens; None draws one.
    """

    temperature: float
    seed: int | None


@dataclass(frozen=True)
class Turn:
    """A question that was answered.

    Attributes:
        prompt: what the steered model was given: system prompt, the turns before, and the question.
        answers: of each column.
        steering: every strength written out; None where nothing steered.
        sampling: as it was then.
    """

    prompt: Messages
    answers: dict[str, Answer]
    steering: str | None
    sampling: Sampling

    def said(self, column: str) -> str:
        """An answer's text; the steered one where the column was not asked.

        Args:
            column: which.
        """
        return self.answers.get(column, self.answers[STEERED]).text

    def as_json(self) -> dict[str, Any]:
        """The turn as a line of JSONL; `steerkit generate --prompts` reads its prompt."""
        done = self.answers[STEERED].done
        baseline = {"baseline": self.said(PLAIN)} if PLAIN in self.answers else {}
        return {
            "prompt": self.prompt,
            "text": self.said(STEERED),
            **baseline,
            "steering": self.steering,
            "finish": None if done is None else done.finish,
            **asdict(self.sampling),
        }


class Answering:
    """Answers under way, all in one batch. Iterating gives each column's pieces as they come, until all have ended.

    Args:
        engine: answers.
        requests: of each column.

    Attributes:
        answers: of each column, as far as they have come.

    Raises:
        SteerError: a request that cannot be answered; none is then.
    """

    def __init__(self, engine: Engine, requests: dict[str, Request]) -> None:
        from steerkit.serve import Answer

        self.answers = {column: Answer() for column in requests}
        self._engine = engine
        self._events: SimpleQueue[tuple[str, Event]] = SimpleQueue()
        asked = [(request, functools.partial(self._put, column)) for column, request in requests.items()]
        self._tickets = engine.submit(*asked)
        try:
            for ticket in self._tickets:
                ticket.planned.result()
        except BaseException:
            self.stop()
            raise

    def _put(self, column: str, event: Event) -> None:
        self._events.put((column, event))

    def __iter__(self) -> Iterator[tuple[str, Event]]:
        while any(answer.done is None for answer in self.answers.values()):
            column, event = self._events.get()
            self.answers[column].add(event)
            yield column, event

    def stop(self) -> None:
        """End all of them at the next step; what has come stays."""
        for ticket in self._tickets:
            self._engine.cancel(ticket)


@dataclass
class Chat:
    """A conversation.

    Attributes:
        engine: answers.
        model: alias of the model, whose shipped vectors come first.
        sampling: how tokens are chosen.
        steering: what the answers are steered by; None for nothing.
        system: the system prompt; empty for none.
        compares: whether each question is answered by the plain model too.
        turns: so far.
    """

    engine: Engine
    model: str
    sampling: Sampling
    steering: Composition | None = None
    system: str = ""
    compares: bool = False
    turns: list[Turn] = field(default_factory=list)
    _vectors: list[SteeringVector] = field(default_factory=list)
    _saved: set[Path] = field(default_factory=set)

    def steer(self, steering: Composition | None) -> None:
        """Steer the next answers; where that cannot be, nothing changes.

        Args:
            steering: None for nothing.

        Raises:
            SteerError: a vector that cannot be had, or one that needs a strength and has none.
        """
        from steerkit.composition.binding import described

        vectors = [] if steering is None else steering.vectors(model=self.model)
        self.steering = None if steering is None else described(steering.terms, vectors)
        self._vectors = vectors

    def ask(self, question: str) -> Answering:
        """Have a question answered. It becomes a turn by `keep`.

        Args:
            question: of the user.

        Raises:
            SteerError: it cannot be answered; the conversation stays as it is.
        """
        from steerkit.serve import Request

        def asked(column: str, **more: Any) -> Request:
            return Request(self.messages(column, question), **asdict(self.sampling), **more)

        columns = {PLAIN: asked(PLAIN)} if self.compares else {}
        columns[STEERED] = asked(STEERED, steering=self._vectors or None, kl=self.compares)
        return Answering(self.engine, columns)

    def messages(self, column: str, question: str) -> Messages:
        """A question with all that was said before it.

        Args:
            column: whose answers were given.
            question: of the user.
        """
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            found += [turn.prompt[-1], {"role": "assistant", "content": turn.said(column)}]
        return [*found, {"role": "user", "content": question}]

    def keep(self, question: str, answers: dict[str, Answer]) -> Turn | None:
        """Add a turn to the conversation, whole or as far as it came before it was stopped.

        Args:
            question: of the user.
            answers: of each column.

        Returns:
            The turn; None where it was stopped before anything was said.

        Raises:
            SteerError: an answer ended with an error; the conversation stays as it is.
        """
        ends = [answer.done for answer in answers.values() if answer.done is not None]
        for done in ends:
            if done.finish == "error":
                raise SteerError(done.error or "the answer failed")
        is_stopped = any(done.finish == "cancelled" for done in ends)
        if is_stopped and not any(answer.text for answer in answers.values()):
            return None
        steering = None if self.steering is None else str(self.steering)
        turn = Turn(self.messages(STEERED, question), answers, steering, self.sampling)
        self.turns.append(turn)
        return turn

    def save(self, path: Path) -> None:
        """Write the conversation as JSONL, a turn a line, whole or not at all.

        Args:
            path: of the file; one that was there before this conversation is not replaced.

        Raises:
            SteerError: it cannot be written there, or there is nothing to write.
        """
        if not self.turns:
            raise SteerError("nothing has been said yet, so there is nothing to save")
        target = path.absolute()
        if target.exists() and target not in self._saved:
            raise SteerError(f"{path}: is there already; choose another name")
        lines = [json.dumps(turn.as_json(), ensure_ascii=False) for turn in self.turns]
        try:
            write_whole(path, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
        except (OSError, ValueError) as error:
            raise SteerError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
        self._saved.add(target)
