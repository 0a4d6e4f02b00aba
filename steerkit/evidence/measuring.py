"""A run: the unsteered model's answers, those under system prompts, and those of every vector, part by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steerkit.evaluate.scoring import measure
from steerkit.evaluate.setup import Setup, free_unused
from steerkit.evaluate.store_identity import digest_of, weights_digest
from steerkit.evidence.answering import SHIFT, Bench, Row, shuffled_words
from steerkit.evidence.behaviours import Behaviour, asked_of
from steerkit.evidence.folder import Folder, part_of_behaviour, part_of_unsteered
from steerkit.evidence.questions import Question, QuestionSet, measured_on, trained_on
from steerkit.evidence.subjects import Subject
from steerkit.prompts.conversation import SIDES
from steerkit.prompts.system_prompts import SystemPrompts

__all__ = ["Run", "forecast", "rows_of"]

FORMAT = 1
NEUTRAL = 12
"""Neutral texts on which costs are measured."""
WORDINGS_EACH = 2
"""Under so many of the wordings each training question is answered."""


@dataclass(frozen=True, eq=False)
class Run:
    """What is measured, on which model, and where it is kept.

    Attributes:
        bench: the model that answers.
        folder: where the answers go.
        step: called with the name of each part that is begun.
    """

    bench: Bench
    folder: Folder
    step: Callable[[str], None] = lambda _: None

    def unsteered(self, asked: QuestionSet) -> None:
        """Measure the unsteered answers to a set of questions, if they are not there.

        Args:
            asked: the set.

        Raises:
            SteerError: see `Folder.write` and `steerkit.generate`.
        """
        every, name = asked_of(asked, "measure"), part_of_unsteered(asked)
        key = self._key(every=[one.text for one in every])
        if self.folder.has(name, key):
            return
        self.step(name)
        rows = self.bench.scored(self.bench.answered([_row(one, "0") for one in every]))
        if asked == "questions":
            rows += self._shuffled(rows)
        self.folder.write(name, {"key": key, "of": name}, rows)

    def prompted(self, behaviour: Behaviour) -> None:
        """Measure the answers under a behaviour's system prompts, if they are not there.

        Args:
            behaviour: the behaviour.

        Raises:
            SteerError: see `Folder.write` and `steerkit.generate`.
        """
        name, prompting = part_of_behaviour(behaviour.name), behaviour.prompting
        every, train = asked_of(behaviour.asked, "measure"), trained_on(asked_of(behaviour.asked, "train"))
        key = self._key(prompting=_texts(prompting), every=[one.text for one in (*every, *train)])
        if self.folder.has(name, key):
            return
        self.step(name)
        rows = [_row(one, "prompt", system=_worded(prompting.positive, place)) for place, one in enumerate(every)]
        rows += [
            _row(one, side, system=_worded(getattr(prompting, side), place + turn))
            for place, one in enumerate(train)
            for turn in range(WORDINGS_EACH)
            for side in SIDES
        ]
        rows = self.bench.answered(rows)
        measured = self.bench.scored(rows[: len(every)])
        self.folder.write(
            name, {"key": key, "of": name, "prompting": _texts(prompting)}, [*measured, *rows[len(every) :]]
        )

    def steered(self, subject: Subject, prompting: SystemPrompts) -> None:
        """Measure a vector's answers and costs, if they are not there.

        Args:
            subject: the vector.
            prompting: system prompts that ask for its behaviour.

        Raises:
            SteerError: see `Folder.write` and `steerkit.generate`.
        """
        questions = measured_on(subject.asked, asked_of(subject.asked, "measure"))
        key = self._key(
            vector=subject.vector.digest,
            strength=subject.strength,
            two_way=subject.two_way,
            prompting=_texts(prompting),
            every=[one.text for one in questions],
        )
        if self.folder.has(subject.name, key):
            return
        self.step(subject.name)
        strengths = {"-": -subject.strength} if subject.two_way else {}
        strengths |= {"+": subject.strength, "prompt and steering": subject.strength}
        rows = [
            _row(one, condition, strength, _worded(prompting.positive, place) if "prompt" in condition else None)
            for condition, strength in strengths.items()
            for place, one in enumerate(questions)
        ]
        rows = self.bench.answered(rows, subject.vector)
        scored = [
            one for name in strengths for one in self.bench.scored([row for row in rows if row.condition == name])
        ]
        facts = {
            "key": key,
            "of": subject.name,
            "behaviour": subject.behaviour,
            "asked": subject.asked,
            "digest": subject.vector.digest,
            "strength": subject.strength,
            "unit": subject.vector.unit,
            "costs": self._costs(subject),
        }
        self.folder.write(subject.name, facts, scored)

    def _costs(self, subject: Subject) -> dict[str, Any]:
        free_unused()
        setup = Setup(self.bench.model, self.bench.tokenizer, batch_size=NEUTRAL).first_neutral(NEUTRAL)
        found = measure(setup.trial(subject.vector, subject.strength), ["divergence"])
        return {
            name: dict(zip(("mean", "low", "high"), found[name].effect, strict=True))
            for name in ("kl", "perplexity_ratio")
        }

    def _shuffled(self, rows: Sequence[Row]) -> list[Row]:
        """The same answers with their words shuffled, and answers beside questions that they are none to."""
        mixed = [shuffled_words(row.text, seed) for seed, row in enumerate(rows)]
        nll = self.bench.surprise([(row.question, text) for row, text in zip(rows, mixed, strict=True)])
        other = [rows[(place + 2 * SHIFT) % len(rows)].text for place in range(len(rows))]
        z = self.bench.fit(rows, other)
        return [
            *(
                replace(row, condition="shuffled words", text=text, nll=nats, z=None)
                for row, text, nats in zip(rows, mixed, nll, strict=True)
            ),
            *(
                replace(row, condition="shuffled pair", text=text, nll=None, z=fits)
                for row, text, fits in zip(rows, other, z, strict=True)
            ),
        ]

    def _key(self, **more: Any) -> str:
        bench = self.bench
        return digest_of(
            {
                "format": FORMAT,
                "weights": weights_digest(bench.model),
                "max_new_tokens": bench.max_new_tokens,
                **more,
            }
        )


def forecast(bench: Bench, rows: int = 6) -> float:
    """Seconds that a measured row takes, from one small batch: answered, and read twice.

    Args:
        bench: the model that answers.
        rows: in the batch.
    """
    questions = asked_of("questions", "measure")[:rows]
    start = time.monotonic()
    bench.scored(bench.answered([_row(one, "0") for one in questions]))
    return (time.monotonic() - start) / rows


def rows_of(subjects: Mapping[str, str]) -> dict[str, float]:
    """About how many measured rows each part has; answers that only train a classifier are not read and count half.

    Args:
        subjects: names of vectors, with their behaviours.
    """
    train = 40.0 * 2 * WORDINGS_EACH / 2
    behaviours = dict.fromkeys(subjects.values())
    found = {"unsteered-questions": 120.0} | {part_of_behaviour(name): 40.0 + train for name in behaviours}
    if "refusal" in behaviours:
        found["unsteered-requests"] = 60.0
    return found | dict.fromkeys(subjects, 120.0)


def _row(question: Question, condition: str, strength: float = 0.0, system: str | None = None) -> Row:
    return Row(question.text, condition, strength, system, question.wanted)


def _worded(wordings: Sequence[str], place: int) -> str:
    return wordings[place % len(wordings)]


def _texts(prompting: SystemPrompts) -> dict[str, list[str]]:
    return {"positive": list(prompting.positive), "negative": list(prompting.negative)}
