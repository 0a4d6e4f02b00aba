"""Strength-response: an effect and its costs over strengths, with intervals and random directions beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.scorers._base import Scorer
from steerkit.evaluate.scoring import Measured, column_of, ends, measure, scorer_of
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.trial import Trial
from steerkit.methods._registry import method_of
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Curve", "random_like", "strength_response"]


@dataclass(frozen=True)
class Curve:
    """Effect and costs of one vector over strengths.

    Attributes:
        effect: the column that shows the effect.
        strengths: rising, in the vector's unit.
        points: at each strength every column that was measured.
        controls: for each random direction the mean effect by strength, at every strength it was measured at.
        items: number of held-out items.
        neutral: the strength at which nothing is steered; None where there is none.
    """

    effect: str
    strengths: tuple[float, ...]
    points: tuple[Mapping[str, Measured], ...]
    controls: tuple[Mapping[float, float], ...]
    items: int
    neutral: float | None = 0.0

    @property
    def effects(self) -> tuple[Estimate, ...]:
        """The effect at each strength, with its interval."""
        return tuple(point[self.effect].estimate for point in self.points)

    @property
    def rises(self) -> bool:
        """Whether the effect rises from each strength to the next."""
        means = [estimate.mean for estimate in self.effects]
        return all(before < after for before, after in pairwise(means))

    @property
    def clear_of_controls(self) -> bool:
        """Whether the effect is clear of every random direction: above at the highest strength, below at the lowest.

        Changes on the same items are compared: what items differ in is no doubt about what steering changes in them.
        An end at which no random direction was measured, or that does not lie on its side of the neutral strength, is
        not looked at; without a neutral strength only the highest is.
        """
        lowest, highest = self.strengths[0], self.strengths[-1]
        first, last = self.points[0][self.effect], self.points[-1][self.effect]
        below = not self._beyond(lowest, -1) or all(
            first.gain.high < first.gain_of(control[lowest]) for control in self.controls if lowest in control
        )
        above = not self._beyond(highest, 1) or all(
            last.gain.low > last.gain_of(control[highest]) for control in self.controls if highest in control
        )
        return below and above

    def _beyond(self, strength: float, sign: int) -> bool:
        """Whether a strength lies above (1) or below (-1) the neutral one."""
        return sign > 0 if self.neutral is None else sign * (strength - self.neutral) > 0

    def as_rows(self) -> list[dict[str, Any]]:
        """One plain dict per strength: the effect, the random directions, and every column under `scores`."""
        return [
            {
                "strength": strength,
                "effect": self.effects[place].mean,
                **dict(zip(("low", "high"), ends(self.effects[place]), strict=True)),
                "random": [control[strength] for control in self.controls if strength in control],
                "scores": {name: measured.as_row() for name, measured in self.points[place].items()},
            }
            for place, strength in enumerate(self.strengths)
        ]


def strength_response(
    setup: Setup,
    vector: SteeringVector,
    strengths: Sequence[float],
    *,
    scorers: Sequence[str | Scorer] = ("preference_margin",),
    effect: str | None = None,
    controls: int = 5,
    control_strengths: Sequence[float] | None = None,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> Curve:
    """Measure a vector at several strengths, and the effect of random directions of the same norm.

    Args:
        setup: model, tokenizer and held-out items.
        vector: the vector.
        strengths: in rising order, in the vector's unit.
        scorers: what is measured; the first one shows the effect.
        effect: another column that shows the effect.
        controls: number of random directions.
        control_strengths: where they are measured; None measures them at every strength.
        seed: fixes the random directions and the intervals.
        step: called after each measurement, for a progress bar.

    Returns:
        The curve.

    Raises:
        DataError: the items lack what a scorer needs, or no scorer gives the column `effect`.
    """

    def at(trial: Trial, chosen: Sequence[str | Scorer]) -> dict[str, Measured]:
        found = measure(trial, chosen, seed=seed)
        step()
        return found

    points = tuple(at(trial, scorers) for trial in _trials(setup, [vector], strengths))
    shown = column_of(effect or next(iter(points[0])), points[0])
    # Only the scorer that shows the effect is run on the controls.
    showing = [scorer for scorer in scorers if shown in scorer_of(scorer).columns]
    measured = strengths if control_strengths is None else control_strengths
    randoms = [random_like(vector, seed=seed + 1 + number) for number in range(controls)]
    beside = iter(_trials(setup, randoms, measured))
    return Curve(
        effect=shown,
        strengths=tuple(strengths),
        points=points,
        controls=tuple(
            {strength: at(next(beside), showing)[shown].estimate.mean for strength in measured} for _ in randoms
        ),
        items=points[0][shown].items,
        neutral=method_of(vector).neutral_strength,
    )


def _trials(setup: Setup, vectors: Sequence[SteeringVector], strengths: Sequence[float]) -> list[Trial]:
    """Every vector at every strength; the baseline at the neutral one."""
    pairs = [(vector, strength, method_of(vector).neutral_strength) for vector in vectors for strength in strengths]
    steered = iter(setup.trials((vector, strength) for vector, strength, neutral in pairs if strength != neutral))
    return [setup.baseline if strength == neutral else next(steered) for _, strength, neutral in pairs]


def random_like(vector: SteeringVector, *, seed: int) -> SteeringVector:
    """The same vector with nothing learned in it: for most methods, random directions of the same norms.

    Args:
        vector: the vector to imitate.
        seed: fixes the draw.

    Raises:
        FitError: the vector's method has no random control.
    """
    return method_of(vector).control(vector, torch.Generator().manual_seed(seed))
