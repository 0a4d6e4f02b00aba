"""What is asked: open questions that no vector was fitted on, and requests for the refusal vectors.

Forty questions measure, forty others train the classifiers. Refusal is measured on requests of sources that the gates'
fits hold out, and its classifier is trained on requests of the other sources.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steerkit.prompts.rendering import spread

__all__ = ["Question", "QuestionSet", "measured_on", "open_questions", "requests", "trained_on"]

QuestionSet = Literal["questions", "harmful", "requests"]
COUNT = 40


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: what is asked.
        wanted: whether the behaviour is wanted here; a gate is to leave the others alone.
    """

    text: str
    wanted: bool = True


def open_questions(use: Literal["measure", "train"]) -> list[Question]:
    """The shipped open questions: opinion, advice, description, small talk, explanation and short writing.

    Args:
        use: those that measure, or those that train the classifiers.
    """
    lines = Path(__file__).with_name("questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [Question(row["prompt"]) for row in map(json.loads, lines) if row["use"] == use]


def requests(file: Path, held_out_sources: Sequence[str], use: Literal["measure", "train"]) -> list[Question]:
    """Requests, the harmful ones first: spread over the sources that were held out, or over the others.

    Args:
        file: labelled requests with `source`, `label` and where harmless a `topic`.
        held_out_sources: of the gates' fits.
        use: those that measure, or those that train the classifiers.
    """
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    own = [row for row in rows if (row["source"] in held_out_sources) == (use == "measure")]
    harmful = [row["prompt"] for row in own if row["label"] == "harmful"]
    ordinary = [row["prompt"] for row in own if row.get("topic") == "ordinary"]
    return [
        *(Question(text) for text in spread(harmful, COUNT)),
        *(Question(text, wanted=False) for text in spread(ordinary, COUNT // 2)),
    ]


def measured_on(asked: QuestionSet, every: Sequence[Question]) -> list[Question]:
    """The questions of a set, of all that the unsteered model answered.

    Args:
        asked: open questions, forty harmful requests, or twenty harmful and twenty ordinary ones.
        every: open questions, or what `requests` gives.
    """
    if asked == "requests":
        harmful = [one for one in every if one.wanted]
        return [*harmful[::2], *(one for one in every if not one.wanted)]
    return [one for one in every if one.wanted]


def trained_on(every: Sequence[Question]) -> list[Question]:
    """The questions whose answers train a classifier: those on which both sides of the system prompts differ.

    Args:
        every: open questions, or what `requests` gives.
    """
    return [one for one in every if one.wanted]
