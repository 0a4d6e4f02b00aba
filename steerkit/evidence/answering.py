"""The answers, and what the unsteered model says of them: how predictable they are, and whether they fit the question.

All answers of a vector come from one batch with a strength per row.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from steerkit.evaluate.setup import Setup
from steerkit.generation import generate
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["SHIFT", "Bench", "Row", "shuffled_words"]

SHIFT = 13
"""Whose answer stands for "another answer": that of so many questions further on, so that it is of another kind."""


@dataclass(frozen=True)
class Row:
    """One answer.

    Attributes:
        question: what was asked.
        condition: ``-``, ``0``, ``+``, ``prompt`` or ``prompt and steering``; ``positive`` or ``negative`` where a
            classifier is trained on it.
        strength: how strongly was steered.
        system: the system prompt, if there was one.
        wanted: whether the behaviour is wanted here.
        text: the answer.
        nll: nats per token under the unsteered model, given the question alone; None where there is no answer.
        z: how much likelier it makes the question than another answer does, nats.
        ratings: of a judge, from 0 to 1, where there was one.
    """

    question: str
    condition: str
    strength: float = 0.0
    system: str | None = None
    wanted: bool = True
    text: str = ""
    nll: float | None = None
    z: float | None = None
    ratings: Mapping[str, float] | None = None


@dataclass(frozen=True, eq=False)
class Bench:
    """A model that answers.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        batch_size: rows per pass of answers; scoring takes a sixth of it.
        max_new_tokens: length of an answer.
    """

    model: nn.Module
    tokenizer: Any
    batch_size: int = 120
    max_new_tokens: int = 40

    def answered(self, rows: Sequence[Row], vector: SteeringVector | None = None) -> list[Row]:
        """The rows with their answers, greedy.

        Args:
            rows: what is asked, how strongly steered.
            vector: what steers; None for the unsteered model.
        """
        prompts = [Conversation(row.question, system=row.system) for row in rows]
        steering: dict[str, Any] = {}
        if vector is not None:
            steering = {"vector": replace(vector, strength=None), "strength": [row.strength for row in rows]}
        texts = generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            **steering,
        )
        return [replace(row, text=text) for row, text in zip(rows, texts, strict=True)]

    def scored(self, rows: Sequence[Row]) -> list[Row]:
        """The rows of one condition with what the unsteered model says of them.

        Args:
            rows: answers to questions that follow each other.
        """
        nll = self.surprise([(row.question, row.text) for row in rows])
        z = self.fit(rows, [row.text for row in rows])
        return [replace(row, nll=nats, z=fits) for row, nats, fits in zip(rows, nll, z, strict=True)]

    def surprise(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Nats per token of answers, given their questions; None for an empty one.

        Args:
            pairs: questions and answers.
        """
        found = self._log_probs([self._asked(*pair) if pair[1].strip() else None for pair in pairs])
        return [None if one is None else -one[1] for one in found]

    def fit(self, rows: Sequence[Row], texts: Sequence[str]) -> list[float | None]:
        """How much likelier texts make the rows' questions than the answer of another row does, nats.

        Args:
            rows: whose questions, and whose answers stand for another answer.
            texts: one per row; an empty one gives None.
        """
        others = [rows[(place + SHIFT) % len(rows)].text for place in range(len(rows))]
        pairs = [(row.question, text) for row, text in zip(rows, texts, strict=True)]
        pairs += [(row.question, text) for row, text in zip(rows, others, strict=True)]
        found = self._log_probs([self._told(*pair) for pair in pairs])
        own, other = found[: len(rows)], found[len(rows) :]
        return [
            None if not text.strip() or one is None or two is None else one[0] - two[0]
            for text, one, two in zip(texts, own, other, strict=True)
        ]

    def _asked(self, question: str, answer: str) -> Rendered:
        return self._setup.render(Conversation(question, answer=answer))

    def _told(self, question: str, answer: str) -> Rendered:
        """The question behind an answer, as plain text."""
        before = f"{answer.strip()}\n\nThis is the answer to the question:"
        return self._setup.render(Conversation(before, answer=f" {question}", raw=True))

    @property
    def _setup(self) -> Setup:
        return Setup(self.model, self.tokenizer, batch_size=max(1, self.batch_size // 6))

    def _log_probs(self, texts: Sequence[Rendered | None]) -> list[tuple[float, float] | None]:
        """Sum and mean over the tokens of what is called an answer; texts that stand there twice are read once."""
        listed = list(dict.fromkeys(text for text in texts if text is not None))
        found = dict(zip(listed, self._setup.baseline.log_probs(listed), strict=True)) if listed else {}
        return [None if one is None else (float(found[one].sum()), float(found[one].mean())) for one in texts]


def shuffled_words(text: str, seed: int) -> str:
    """The text with its words in another order.

    Args:
        text: any text.
        seed: fixes the order.
    """
    words = text.split()
    random.Random(seed).shuffle(words)
    return " ".join(words)
