"""Which rollouts show a trait: scores of both answers of a row, and the filter that keeps or drops the row as a whole.

With a judge, who rates the trait by the specification's rubric and coherence by one of ours (paper, section 2):

    keep row i  iff  trait(positive_i) >= 50,  trait(negative_i) < 50,  coherence of both >= 50

Without one, by the model's own probabilities:

    margin(answer) = mean over its tokens of log p(token | its own system prompt)
                     - the same under the system prompt of the other side
    keep row i  iff  both margins > 0,  neither answer repeats itself,  neither is a refusal

A margin says that an answer fits the system prompt it was given under better than the opposite one; it does not say
that the trait is there to be seen, so it is the weaker filter of the two. Empty answers drop the row either way,
and so does what the judge gives no number for.

Chen et al. (2025), "Persona Vectors", arXiv 2507.21509. Where this file departs: the filter without a judge is ours,
and so is the wording of the rubric for coherence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from steerkit.errors import DataError
from steerkit.evaluate.scorers.repetition import repeated_share
from steerkit.methods._declining import is_refusal
from steerkit.persona.rollout_plan import SIDES
from steerkit.persona.rollouts import Rollout
from steerkit.persona.scores import Scores

__all__ = ["UNENDED", "Filtered", "Rules", "counts_text", "filtered"]

UNENDED = "thought without an end"


@dataclass(frozen=True)
class Rules:
    """When a row is kept.

    Attributes:
        trait: points of 100 that the positive answer reaches; the negative one stays below 100 minus this.
        coherence: points of 100 that both answers reach.
        margin: nats per token that both margins exceed, without a judge.
        repetition: share of repeated 4-grams that neither answer exceeds, without a judge.
    """

    trait: float = 50.0
    coherence: float = 50.0
    margin: float = 0.0
    repetition: float = 0.3

    def __post_init__(self) -> None:
        for name in ("trait", "coherence", "margin", "repetition"):
            if not math.isfinite(getattr(self, name)):
                raise DataError(f"{name} = {getattr(self, name)}: give a finite number")


class Filtered(NamedTuple):
    """What was kept.

    Attributes:
        kept: places of the rows that are kept, in order.
        reasons: why rows were dropped, with the number of rows; a row may have several.
        rows: how many there were.
    """

    kept: tuple[int, ...]
    reasons: Mapping[str, int]
    rows: int

    def sentence(self) -> str:
        """The counts in words."""
        return counts_text(len(self.kept), self.rows, self.reasons)


def counts_text(kept: int, rows: int, reasons: Mapping[str, int]) -> str:
    """How many pairs were kept, and why the others were dropped, in words.

    Args:
        kept: pairs that are kept.
        rows: how many there were.
        reasons: reason to number of pairs.
    """
    ordered = sorted(reasons.items(), key=lambda one: (-one[1], one[0]))
    listed = ", ".join(f"{reason} {count}" for reason, count in ordered)
    return f"{kept} of {rows} pairs kept" + (f"; dropped for: {listed}" if listed else "")


def filtered(rollouts: Sequence[Rollout], scores: Scores, rules: Rules | None = None) -> Filtered:
    """Keep or drop every row as a whole.

    Args:
        rollouts: the rows.
        scores: of the same rows, in the same order.
        rules: when a row is kept.

    Returns:
        What is kept, and why the others are not.
    """
    rules = rules or Rules()
    counts: Counter[str] = Counter()
    kept = []
    for place, row in enumerate(rollouts):
        reasons = _empty(row)
        if not reasons:
            reasons = _by_margin(row, scores, place, rules) if scores.judge is None else _by_judge(scores, place, rules)
        counts.update(reasons)
        if not reasons:
            kept.append(place)
    return Filtered(tuple(kept), dict(counts.most_common()), len(rollouts))


def _empty(row: Rollout) -> list[str]:
    """Why an answer has nothing to read, if that is so."""
    wordless = [getattr(row, side) for side in SIDES if not row.answer(side)]
    return list(dict.fromkeys(UNENDED if text.strip() else "empty answer" for text in wordless))


def _by_judge(scores: Scores, place: int, rules: Rules) -> list[str]:
    trait, coherence = scores.trait[place], scores.coherence[place]
    positive, negative = trait
    reasons = []
    if positive is None or negative is None or None in coherence:
        reasons.append("no score by the judge")
    if positive is not None and positive < rules.trait:
        reasons.append("trait too weak")
    if negative is not None and negative >= 100 - rules.trait:
        reasons.append("trait on the other side")
    if any(one is not None and one < rules.coherence for one in coherence):
        reasons.append("incoherent")
    return reasons


def _by_margin(row: Rollout, scores: Scores, place: int, rules: Rules) -> list[str]:
    answers = [row.answer(side) for side in SIDES]
    reasons = []
    if not all(margin is not None and margin > rules.margin for margin in scores.margin[place]):
        reasons.append("fits the other system prompt as well")
    if any(is_refusal(answer) for answer in answers):
        reasons.append("refusal")
    if any(repeated_share(answer) > rules.repetition for answer in answers):
        reasons.append("repeats itself")
    return reasons
