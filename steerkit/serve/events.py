"""What comes back for a request: pieces of text with their tokens, and at the end how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

__all__ = ["Answer", "Done", "Event", "Finish", "Piece", "Token", "gathered"]

Finish = Literal["stop", "length", "cancelled", "error"]


class Token(NamedTuple):
    """One generated token.

    Attributes:
        id: its number.
        logprob: its log-probability in nats under the steered model, before temperature; None where nobody asked.
        top: the likeliest ids, each with its log-probability.
        kl: Kullback-Leibler divergence in nats of the steered distribution that it was drawn from (before temperature)
            from the unsteered one over the same text; None where nobody asked.
        reading: of the request's probe at the position that chose it, see `Probe`; None where nobody asked.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    kl: float | None = None
    reading: float | None = None


@dataclass(frozen=True)
class Piece:
    """More of an answer.

    Attributes:
        choice: which of the request's answers, from 0.
        text: what is new; it may be empty where a character, or what may become a stop text, is not yet complete.
        tokens: what is new.
    """

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Done:
    """The end of one answer.

    Attributes:
        choice: which of the request's answers, from 0.
        finish: `stop` (the model ended it, or a stop text came), `length`, `cancelled`, or `error`.
        prompt_tokens: tokens of the prompt.
        cached_tokens: those of them that had been read before.
        tokens: that were generated.
        error: what went wrong, in one line.
    """

    choice: int
    finish: Finish
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    error: str | None = None


Event = Piece | Done


@dataclass
class Answer:
    """One whole answer.

    Attributes:
        text: without special tokens.
        tokens: that were generated, the one that ended it left out.
        done: how it ended.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    done: Done | None = None

    def add(self, event: Event) -> None:
        """Take what came next.

        Args:
            event: of this answer.
        """
        if isinstance(event, Done):
            self.done = event
        else:
            self.text += event.text
            self.tokens += event.tokens


def gathered(events: Sequence[Event]) -> list[Answer]:
    """The answers that events make, by choice.

    Args:
        events: all of a request's.
    """
    answers = [Answer() for _ in range(1 + max(event.choice for event in events))]
    for event in events:
        answers[event.choice].add(event)
    return answers
