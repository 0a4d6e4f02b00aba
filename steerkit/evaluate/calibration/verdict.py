"""What the held-out items say of a calibrated strength, in one line: confirmed, not confirmed, nothing, or too few."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from steerkit.evaluate.calibration.budget import Budget
from steerkit.evaluate.calibration.problem import Problem, layers_name, strength_of
from steerkit.evaluate.intervals import Estimate, too_few
from steerkit.evaluate.scoring import Measured
from steerkit.evaluate.sweeps import Point

__all__ = ["Verdict", "judged", "unfound"]

_NOTHING = "nothing works"
_TOO_FEW = "too few items to tell"


class Verdict(NamedTuple):
    """What was found.

    Attributes:
        works: there is an effect, clear of every control, inside the budget.
        has_effect: there is an effect, clear of every control.
        words: the same in one line, with the figures.
        is_open: too few items say whether there is one.
    """

    works: bool
    has_effect: bool
    words: str
    is_open: bool = False

    @property
    def suggests(self) -> bool:
        """Whether the strength that was chosen is one to begin with; a null suggests none."""
        return self.has_effect or self.is_open


def judged(
    effect: str,
    budget: Budget,
    confirmed: Mapping[str, Measured],
    controls: Sequence[float],
    *,
    due: Collection[str] | None = None,
) -> Verdict:
    """Whether the held-out items confirm what was chosen.

    Args:
        effect: the column that shows the effect.
        budget: what it may cost.
        confirmed: figures on the held-out items.
        controls: mean effects of vectors with nothing learned in them.
        due: costs that have to be among the figures; None takes all that the budget limits.
    """
    measured = confirmed[effect]
    # On the same items: what items differ in is no doubt about what steering changes in each of them.
    highest = max((measured.gain_of(control) for control in controls), default=math.inf)
    reached = _reached(effect, measured, "held-out items")
    if not measured.gain.low > max(0.0, highest):
        over, limit = (0.0, "zero") if not measured.gain.low > 0 else (highest, f"a control's {highest:.3g}")
        if too_few(measured.gain, measured.items, over=over):
            said = f"{_TOO_FEW}: {reached}, anything from {limit} to an effect that would count; give more items"
            return Verdict(False, False, said, is_open=True)
        return Verdict(False, False, f"{_NOTHING}: {reached}, which is not clear of {limit}")
    broken = budget.breaks(confirmed, due=budget.limits if due is None else due)
    if broken:
        return Verdict(False, True, f"not confirmed: {reached}, but {' and '.join(broken)}")
    return Verdict(True, True, f"{reached}, clear of {len(controls)} controls and inside the budget")


def unfound(problem: Problem, points: Sequence[Point]) -> str:
    """Why nothing was chosen, in one line.

    Args:
        problem: what was calibrated.
        points: everything tried.
    """
    inside = [point for point in points if not problem.budget.breaks(dict(point.scores))]
    open_ones = [point for point in inside if too_few(problem.gain(point), point.scores[problem.effect].items)]
    if open_ones and not any(problem.gain(point).low > 0 for point in inside):
        best = max(open_ones, key=lambda point: problem.gain(point).mean)
        where = f"layer {layers_name(best.layers)} at strength {strength_of(best):g}"
        reached = _reached(problem.effect, best.scores[problem.effect], "validation items")
        return f"{_TOO_FEW}: at {where} {reached}, anything from zero to an effect that would count; give more items"
    clear = [point for point in points if point not in inside and problem.gain(point).low > 0]
    said = f"{_NOTHING}: no layer and strength tried has a positive effect inside the budget"
    if not clear:
        return said
    least = min(clear, key=lambda point: problem.reach(strength_of(point)))
    broken = " and ".join(problem.budget.breaks(dict(least.scores)))
    return f"{said}; there is one at strength {strength_of(least):g}, but {broken}"


def _reached(effect: str, measured: Measured, where: str) -> str:
    shown: Estimate = measured.effect
    return f"{effect} changes by {shown.mean:.3g} ({shown.low:.3g} to {shown.high:.3g}) on {measured.items} {where}"
