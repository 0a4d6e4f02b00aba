"""`KlSearch`: the strongest strength inside a budget of KL divergence, found from what single strengths cost.

The KL divergence grows about with the square of the strength, so the next one to try lies on a line between the
logarithms of both, through the strongest that is inside the budget and the weakest that is outside. What a strength is
(of a steering vector, or the scale of a task vector) and how its cost is measured is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from steerkit.errors import StrengthError

__all__ = ["MAX_KL", "Cost", "KlSearch", "check_max_kl"]

MAX_KL = 0.15
"""Nats per token: half of what a calibration allows, for searches in which nothing reads the texts for loops."""
_CLOSE = 0.9  # of the budget: near enough
_PASSES = 16


@dataclass(frozen=True)
class Cost:
    """A strength and what it costs.

    Attributes:
        strength: that was tried.
        kl: nats per token.
    """

    strength: float
    kl: float


class KlSearch:
    """Costs by strength, measured as far as asked.

    Args:
        kl: the cost at a strength, nats per token; infinite where there is none.
        furthest: no strength above it is tried.
        advice: what to do where none is found, for the message.
    """

    def __init__(self, kl: Callable[[float], float], furthest: float, *, advice: str) -> None:
        self._kl, self._furthest, self._advice = kl, furthest, advice
        self._tried: list[Cost] = []

    def reaching(self, max_kl: float, first: float) -> Cost:
        """Find the strongest strength that stays inside a budget.

        Args:
            max_kl: the budget, nats per token.
            first: where to begin, above 0.

        Returns:
            The strength, to three digits, and its cost.

        Raises:
            StrengthError: none comes near the budget, or none stays inside it.
        """
        strength, inside = first, None
        for _ in range(_PASSES):
            strength = float(f"{min(strength, self._furthest):.3g}")  # what a file holds should be readable
            if strength not in {one.strength for one in self._tried}:
                self._tried.append(Cost(strength, self._kl(strength)))
            # What lies beyond a strength that is too costly is not trusted, however little it costs.
            self._tried.sort(key=lambda one: one.strength)
            outside = next((one for one in self._tried if not one.kl <= max_kl), None)
            inside = next(
                (one for one in reversed(self._tried) if outside is None or one.strength < outside.strength), None
            )
            if inside is not None and (inside.kl >= _CLOSE * max_kl or inside.strength >= self._furthest):
                break
            strength = _next(inside, outside, max_kl)
        if inside is None or inside.kl < 0.1 * max_kl:
            tried = inside or self._tried[0]
            raise StrengthError(
                f"no strength with a KL divergence near {max_kl:g} was found: {tried.strength:g} gives {tried.kl:.3g}; "
                f"{self._advice}"
            )
        return inside


def check_max_kl(max_kl: float) -> None:
    """Refuse a budget that is none.

    Args:
        max_kl: nats per token.

    Raises:
        StrengthError: it is not a finite number above 0.
    """
    if not math.isfinite(max_kl) or max_kl <= 0:
        raise StrengthError(f"max_kl: got {max_kl!r}; give a number of nats per token above 0, such as {MAX_KL}")


def _next(inside: Cost | None, outside: Cost | None, max_kl: float) -> float:
    """The strength to try next: on the line between the logarithms, or where a square root leads."""
    aim = math.log(0.95 * max_kl)
    if inside is None or outside is None:
        only = inside or outside
        assert only is not None
        steps = 0.5 * (aim - math.log(max(only.kl, 1e-12))) if math.isfinite(only.kl) else -1.0
        return only.strength * math.exp(min(max(steps, -2.0), 2.0))
    low, high = math.log(inside.strength), math.log(outside.strength)
    if not math.isfinite(outside.kl):
        return math.exp((low + high) / 2)
    below, above = math.log(max(inside.kl, 1e-12)), math.log(outside.kl)
    share = min(max((aim - below) / (above - below), 0.1), 0.9)
    return math.exp(low + share * (high - low))
