"""The parts of a report's evidence, each a plain record: plan, separation, projections, texts, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from steerkit.monitor.token_heat import TokenScores
from steerkit.report.figures_text import mean

__all__ = ["EvidencePlan", "Heat", "Projections", "Texts"]


@dataclass(frozen=True)
class EvidencePlan:
    """How much is measured.

    Attributes:
        strengths: at which effect and costs are measured; the suggested and the neutral one are added. None takes them
            from both sides of neutral, as far as the suggested strength and, unless nothing is refitted, half of it.
        questions: answered before and after.
        controls: random directions, and draws of fits on shuffled labels.
        control_strengths: where random directions are measured; None takes the suggested strength and the far end on
            the other side of neutral.
        shuffled: fits on shuffled labels whose effect is measured at the suggested strength.
        texts: prompts answered for repetition and length.
        neutral: neutral texts for KL divergence and perplexity.
        new_tokens: the longest answer.
        refitted: whether the method is fitted again, at every block and on rearranged items.
        seed: fixes controls and intervals.
        batch_size: rows per pass.
    """

    strengths: Sequence[float] | None = None
    questions: Sequence[str] = ()
    controls: int = 5
    control_strengths: Sequence[float] | None = None
    shuffled: int = 3
    texts: int = 6
    neutral: int = 12
    new_tokens: int = 40
    refitted: bool = True
    seed: int = 0
    batch_size: int = 16


class Projections(NamedTuple):
    """Held-out items along the vector's own direction at one site, in activation units.

    Attributes:
        site: where they were read.
        positive: one number per item.
        negative: one number per item.
        auc: share of (positive, negative) couples in the right order, ties counted half.
        cohens_d: distance of the means in pooled standard deviations.
    """

    site: str
    positive: tuple[float, ...]
    negative: tuple[float, ...]
    auc: float
    cohens_d: float

    @property
    def middle(self) -> float:
        """Half-way between the means of the two sides."""
        return (mean(self.positive) + mean(self.negative)) / 2


class Texts(NamedTuple):
    """One question answered three times, greedy.

    Attributes:
        prompt: the question.
        lower: answered at the suggested strength mirrored at the neutral one.
        baseline: answered without steering.
        upper: answered at the suggested strength.
    """

    prompt: str
    lower: str
    baseline: str
    upper: str


@dataclass(frozen=True, eq=False)
class Heat:
    """One prompt answered without and with steering, token by token, both read by the unsteered model.

    Attributes:
        baseline: the prompt with the unsteered answer.
        steered: the prompt with the steered answer.
        middle: what counts as zero.
        shift: how much further along the direction the steered answer's tokens lie under steering, on average.
    """

    baseline: TokenScores
    steered: TokenScores
    middle: float
    shift: float
