"""From one answer's raw figures to its scores, and from scores to what is said of a vector.

    fluency     = max(0, min(1, 1 - (nll - nll_0) / scale)) * (1 - repetition)
    instruction = 1 / (1 + exp(-(slope * z + offset)))
    overall     = 3 / (1/concept + 1/fluency + 1/instruction),    0 where any of the three is 0

`nll` is the answer's mean negative log-likelihood per token under the unsteered model, given the question alone,
`nll_0` that of the unsteered answer to the same question. `scale` is what shuffling the words of the unsteered answers
adds on average, so that 1 is as predictable as the unsteered model's own answer and 0 as its words in any order.

    z = log p(question | answer) - log p(question | an answer to another question, got in the same way)

under the unsteered model, as plain text. `slope` and `offset` are the logistic regression that tells the unsteered
answers' own pairs from shuffled ones: `instruction` is the probability that question and answer belong together. An
answer that says the same whatever is asked has z = 0.

An answer that is empty, or that could not be had, is 0 in all of them, and never makes a difference better: a pair of
answers of which one failed counts at most 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from steerkit.evaluate.intervals import Estimate, interval

__all__ = [
    "LEAST",
    "Calibration",
    "Scores",
    "change",
    "fluency",
    "instruction",
    "mean",
    "overall",
    "verdict",
    "winner",
]

LEAST = 0.15
"""The smallest change of the concept that shows."""


@dataclass(frozen=True)
class Calibration:
    """What the unsteered model's own answers and shuffled ones say about the scales.

    Attributes:
        scale: nats per token that shuffling an answer's words adds.
        slope: of the logistic regression of pairs.
        offset: of the same.
        matched: mean instruction of the unsteered answers' own pairs.
        shuffled: of shuffled pairs.
        auc: how well z tells them apart.
    """

    scale: float
    slope: float
    offset: float
    matched: float
    shuffled: float
    auc: Estimate


class Scores(NamedTuple):
    """Scores of one answer, each from 0 to 1; all are 0 where there is no answer."""

    concept: float
    fluency: float
    instruction: float
    overall: float
    failed: bool = False


def fluency(nll: float, unsteered: float, scale: float, repetition: float) -> float:
    """How predictable an answer is beside the unsteered one, from 0 to 1, times what does not repeat.

    Args:
        nll: nats per token.
        unsteered: of the unsteered answer to the same question.
        scale: what shuffling words adds.
        repetition: share of repeated n-grams.
    """
    return max(0.0, min(1.0, 1.0 - (nll - unsteered) / scale)) * (1.0 - repetition)


def instruction(z: float, slope: float, offset: float) -> float:
    """Probability that question and answer belong together.

    Args:
        z: how much likelier the answer makes the question than another answer does, nats.
        slope: of the calibration.
        offset: of the calibration.
    """
    return 1.0 / (1.0 + math.exp(-max(-700.0, min(700.0, slope * z + offset))))


def overall(concept: float, fluency: float, instruction: float) -> float:
    """The harmonic mean.

    Args:
        concept: from 0 to 1.
        fluency: from 0 to 1.
        instruction: from 0 to 1.
    """
    parts = (concept, fluency, instruction)
    return 0.0 if min(parts) <= 0 else 3.0 / sum(1.0 / part for part in parts)


def mean(values: Sequence[float]) -> Estimate:
    """The mean over questions with its interval.

    Args:
        values: one per question.
    """
    return interval(torch.tensor(values, dtype=torch.double), shares=False)


def change(after: Sequence[Scores], before: Sequence[Scores], name: str) -> Estimate:
    """Mean difference of a score over questions, with its interval.

    Args:
        after: one per question.
        before: of the same questions.
        name: concept, fluency, instruction or overall.
    """
    differences = []
    for one, other in zip(after, before, strict=True):
        difference = float(getattr(one, name)) - float(getattr(other, name))
        differences.append(min(0.0, difference) if one.failed or other.failed else difference)
    return mean(differences)


def verdict(concept: Estimate, overall: Estimate) -> str:
    """What is said of a vector.

    Args:
        concept: change of the concept.
        overall: change of the overall score.

    Returns:
        `shows` where the concept's interval is above 0, the change at least `LEAST` and the overall score does not fall
        (its interval is not below 0); `weak` where the interval is above 0; else `nothing`.
    """
    if not concept.low > 0:
        return "nothing"
    return "shows" if concept.mean >= LEAST and overall.high >= 0 else "weak"


def winner(difference: Estimate) -> str:
    """Who wins.

    Args:
        difference: overall score of steering less that of prompting.
    """
    if difference.low > 0:
        return "steering"
    return "prompting" if difference.high < 0 else "cannot be told"
