"""How the layer of a persona vector is chosen."""

from __future__ import annotations

from dataclasses import dataclass, field

from steerkit.errors import DataError
from steerkit.evaluate.calibration.budget import Budget
from steerkit.evaluate.calibration.result import Calibration

__all__ = ["READOUTS", "Choice", "most_answers"]

READOUTS = ("response_mean", "prompt_mean", "prompt_last")


@dataclass(frozen=True)
class Choice:
    """How the layer is chosen, and what the vector is read from.

    Attributes:
        readout: tokens read: response_mean, prompt_mean or prompt_last.
        layers: blocks to choose from; None takes eight between a quarter and four fifths of the depth.
        strengths: the ladder, rising; None takes the method's own.
        budget: what steering may cost.
        neutral: neutral texts that costs are measured on, half of them to choose and half to confirm.
        screened: held-out pairs that every block is screened on.
        finalists: blocks that climb the ladder after screening.
        controls: random directions, and fits on shuffled labels, of the confirmation.
        texts: prompts answered at the most.
        max_new_tokens: length of those answers, in tokens.
    """

    readout: str = "response_mean"
    layers: tuple[int, ...] | None = None
    strengths: tuple[float, ...] | None = None
    budget: Budget = field(default_factory=Budget)
    neutral: int = 16
    screened: int = 8
    finalists: int = 2
    controls: int = 3
    texts: int = 8
    max_new_tokens: int = 40

    def __post_init__(self) -> None:
        if self.readout not in READOUTS:
            raise DataError(f"readout {self.readout!r}: persona vectors are read from {', '.join(READOUTS)}")
        if self.layers == ():
            raise DataError("layers: got none; give at least one block, or None for the method's own")


def most_answers(found: Calibration) -> tuple[int, ...] | None:
    """The layer with the largest effect inside the budget, sure or not, as the paper chooses.

    Args:
        found: what the calibration tried.

    Returns:
        The layer; None where nothing inside the budget has an effect.
    """
    inside = [point for point in found.points if not found.budget.breaks(dict(point.scores))]
    best = max(inside, key=lambda point: point.scores[found.effect].gain.mean, default=None)
    return None if best is None or not best.scores[found.effect].gain.mean > 0 else best.layers
