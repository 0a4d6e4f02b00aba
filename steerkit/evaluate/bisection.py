"""The strength at which a noisy score crosses a target, by probabilistic bisection, with an interval.

    vote(s)      up where s >= target, else down, with p = P(rate on that side),
                 rate ~ Beta(1/2 + w s, 1/2 + w (1 - s)); where p < 1/2 the vote is turned round and p is 1 - p
    density(x)   times p on the side that is voted for, 1 - p on the other, sqrt(p (1 - p)) at the strength tried
    next try     the first point at which the cumulative density reaches 1/2

The search of ESR (agencyenterprise/endogenous-steering-resistance, `find_boost`), which places a boost so that the
first attempt scores 0.3 of 1 on average, from ten answers that a judge scored. Each score is one noisy look at a rate,
so its vote counts by how sure it is, and no single answer ends the search. Right only where the mean score changes one
way with the strength.

The density finds the crossing well and says badly how well: it takes the votes for independent and every p for right.
In simulations (a logistic curve, scores with a standard deviation of 0.2) its 90 % interval held the crossing in 82 %
of searches after 10 tries, in 50 % after 20 and in 34 % after 40. The interval that is given is another one, of a curve

    mean score = 1 / (1 + exp((x - c) / width + log((1 - target) / target)))      equal to the target at c

drawn through all tries, with its width and the noise of the scores integrated out:

    P(c | tries) ~ prior(c) * sum over widths of (SSE(c, width) + 2 * 0.1^2) ^ (-(n + 2) / 2)

In the same simulations, and with one or four yes-or-no answers a try, it held the crossing in 84 to 92 % of searches
after 20 and 40 tries, after 10 in 51 to 92 % (docs/results/find-strength.md). Where all scores are 0 or 1 it is wide: a
step cannot be told from noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from steerkit.errors import DataError, StrengthError

__all__ = ["FoundStrength", "Posterior", "Vote", "crossing", "find_strength", "vote"]

WEIGHT, POINTS, LEVEL = 5.0, 10_001, 0.9
CURVE_POINTS = 401
WIDTHS = tuple(0.002 * 250 ** (step / 13) for step in range(14))
"""Of the curve, in parts of the range: 0.002 to 0.5, equally spaced in their logarithms."""
NOISE, NOISE_SCORES = 0.1, 2
"""What the noise of scores is taken for beforehand, and how many scores that counts as."""


class Vote(NamedTuple):
    """One try.

    Attributes:
        strength: that was tried.
        score: the mean score there, 0 to 1.
        is_higher: whether the crossing is more likely at a higher strength.
        probability: that it is, at least 1/2.
    """

    strength: float
    score: float
    is_higher: bool
    probability: float


def vote(score: float, target: float, *, weight: float = WEIGHT) -> tuple[bool, float]:
    """What one score says of a rate that falls with the strength.

    Args:
        score: 0 to 1.
        target: strictly between 0 and 1.
        weight: how many answers one score counts as; `w` above.

    Returns:
        Whether the strength should go up, and how probable that is, 1/2 to 1.

    Raises:
        DataError: the score is beyond 0 and 1 or no number, the target is not between them, or the weight not above 0.
    """
    from scipy.special import betainc

    if not 0.0 <= score <= 1.0:
        raise DataError(f"score {score:g}: give scores from 0 to 1")
    _check_target(target)
    if not 0.0 < weight < math.inf:
        raise DataError(f"weight {weight:g}: give a number above 0")
    below = float(betainc(0.5 + weight * score, 0.5 + weight * (1.0 - score), target))
    is_higher = score >= target
    probability = 1.0 - below if is_higher else below
    return (is_higher, probability) if probability >= 0.5 else (not is_higher, 1.0 - probability)


@dataclass(frozen=True, eq=False)
class Posterior:
    """What is believed of the strength at which the score crosses its target.

    Attributes:
        grid: [n] float64, strengths in order.
        density: [n] float64, sums to 1.
    """

    grid: Tensor
    density: Tensor

    @classmethod
    def prior(
        cls, low: float, high: float, *, about: tuple[float, float] | None = None, points: int = POINTS
    ) -> Posterior:
        """What is believed before any score.

        Args:
            low: the lowest strength.
            high: the highest.
            about: mean and standard deviation of a normal density over the range; None is flat.
            points: of the grid.

        Raises:
            StrengthError: the range is empty or not finite, or there are fewer than three points.
            DataError: the standard deviation is not above 0, or the normal density is nothing all over the range.
        """
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise StrengthError(f"strengths from {low:g} to {high:g}: give a lower and a higher finite end")
        if points < 3:
            raise StrengthError(f"a grid of {points} points: give at least 3")
        grid = torch.linspace(low, high, points, dtype=torch.float64)
        density = torch.ones_like(grid)
        if about is not None:
            mean, spread = about
            if not (math.isfinite(mean) and 0.0 < spread < math.inf):
                raise DataError(f"prior {mean:g}, {spread:g}: give a mean and a standard deviation above 0")
            density = torch.exp(-0.5 * ((grid - mean) / spread).square())
            if not float(density.sum()) > 0.0:
                raise DataError(f"prior {mean:g}, {spread:g}: has no weight from {low:g} to {high:g}; move or widen it")
        return cls(grid, density / density.sum())

    def quantile(self, share: float) -> float:
        """The first strength at which so much of the density is reached.

        Args:
            share: 0 to 1.
        """
        place = int(torch.searchsorted(self.density.cumsum(0), torch.tensor(share, dtype=torch.float64)))
        return float(self.grid[min(place, len(self.grid) - 1)])

    @property
    def median(self) -> float:
        """Where half of the density is reached; the next strength that is tried."""
        return self.quantile(0.5)

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The middle part of the density.

        Args:
            level: its share, 0.9 for 90 %.
        """
        return self.quantile(0.5 * (1.0 - level)), self.quantile(0.5 * (1.0 + level))

    def after(self, strength: float, is_higher: bool, probability: float) -> Posterior:
        """What is believed after a vote.

        Args:
            strength: that was tried.
            is_higher: whether the crossing is more likely higher.
            probability: that it is.
        """
        voted, other = probability, 1.0 - probability
        factor = torch.where((self.grid > strength) == is_higher, voted, other)
        factor = torch.where(self.grid == strength, math.sqrt(voted * other), factor)
        density = self.density * factor
        return replace(self, density=density / density.sum())


@dataclass(frozen=True, eq=False)
class FoundStrength:
    """A strength at which a score crosses its target, as far as the tries tell.

    Attributes:
        strength: the median of the votes' density.
        low: lower end of the interval of the curve through all tries (the strength itself where that is lower).
        high: upper end.
        level: of the interval, 0.9 for 90 %.
        target: the score looked for.
        tries: every try, in order.
        ended: `tolerance` where the interval became narrow enough, else `tries`.
        posterior: what the votes say at the end; its own interval is too narrow, see above.
    """

    strength: float
    low: float
    high: float
    level: float
    target: float
    tries: tuple[Vote, ...]
    ended: Literal["tolerance", "tries"]
    posterior: Posterior

    @property
    def is_bracketed(self) -> bool:
        """Whether scores lay on both sides of the target; otherwise the crossing may lie outside of the range."""
        return len({one.score >= self.target for one in self.tries}) == 2

    def as_json(self) -> dict[str, Any]:
        """Plain data, without the density."""
        plain = {name: getattr(self, name) for name in ("strength", "low", "high", "level", "target", "ended")}
        votes = list(self.posterior.interval(self.level))
        tries = [one._asdict() for one in self.tries]
        return {**plain, "votes_interval": votes, "is_bracketed": self.is_bracketed, "tries": tries}


def find_strength(
    score: Callable[[float], float],
    target: float = 0.3,
    *,
    high: float,
    low: float = 0.0,
    rises: bool = False,
    about: tuple[float, float] | None = None,
    tries: int = 20,
    tolerance: float | None = None,
    level: float = LEVEL,
    weight: float = WEIGHT,
    points: int = POINTS,
) -> FoundStrength:
    """Find the strength at which a noisy score crosses a target.

    Args:
        score: the mean score of some answers at a strength, 0 to 1; asked once a try, best on fresh prompts each time.
        target: strictly between 0 and 1. ESR's is 0.3.
        high: the highest strength; for a vector that is applied against its sign, give a `low` below 0.
        low: the lowest.
        rises: whether the score rises with the strength; ESR's falls.
        about: mean and standard deviation of what is believed beforehand; None believes all strengths alike.
        tries: at the most. ESR has 10, which place the crossing to about a twelfth of the range where scores have a
            standard deviation of 0.2.
        tolerance: stop as soon as both ends of the interval are so near the strength; None makes all tries.
        level: of the interval.
        weight: how many answers a score counts as; `w` above.
        points: of the grid.

    Returns:
        The median, the interval, and every try.

    Raises:
        DataError: a score, the target, the level, the weight or the prior is none.
        StrengthError: the range, the tolerance, the tries or the grid is none.

    Example:
        >>> found = find_strength(lambda strength: 1.0 - strength, high=1.0, tolerance=0.05)
        >>> round(found.strength, 1), found.low < 0.7 < found.high, found.ended
        (0.7, True, 'tolerance')
    """
    check_search(target, low=low, high=high, about=about, tolerance=tolerance)
    if not 0.0 < level < 1.0:
        raise DataError(f"level {level:g}: give a share between 0 and 1, such as 0.9")
    if tries < 1:
        raise StrengthError(f"{tries} tries: give at least 1")
    believed, made = Posterior.prior(low, high, about=about, points=points), list[Vote]()
    coarse = Posterior.prior(low, high, about=about, points=CURVE_POINTS)
    ended: Literal["tolerance", "tries"] = "tries"
    while len(made) < tries and ended == "tries":
        strength = believed.median
        value = float(score(strength))
        # A score that rises to t falls, mirrored, to 1 - t.
        is_higher, probability = vote(1.0 - value if rises else value, 1.0 - target if rises else target, weight=weight)
        made.append(Vote(strength, value, is_higher, probability))
        believed = believed.after(strength, is_higher, probability)
        if tolerance is None and len(made) < tries:
            continue
        best, ends = believed.median, crossing(made, target, coarse, rises=rises).interval(level)
        if tolerance is not None and max(abs(end - best) for end in ends) <= tolerance:
            ended = "tolerance"
    return FoundStrength(best, min(best, ends[0]), max(best, ends[1]), level, target, tuple(made), ended, believed)


def check_search(
    target: float, *, low: float, high: float, about: tuple[float, float] | None = None, tolerance: float | None = None
) -> None:
    """Refuse what cannot be searched, before anything is scored.

    Args:
        target: as for `find_strength`.
        low: as for `find_strength`.
        high: as for `find_strength`.
        about: as for `find_strength`.
        tolerance: as for `find_strength`.

    Raises:
        DataError: the target or the prior is none.
        StrengthError: the range or the tolerance is none.
    """
    _check_target(target)
    if tolerance is not None and not 0.0 < tolerance < math.inf:
        raise StrengthError(f"tolerance {tolerance:g}: give a strength above 0")
    Posterior.prior(low, high, about=about, points=CURVE_POINTS)


def crossing(tries: Sequence[Vote], target: float, prior: Posterior, *, rises: bool = False) -> Posterior:
    """What a curve through all tries says of where it crosses the target.

    Args:
        tries: strengths with scores.
        target: strictly between 0 and 1.
        prior: on a grid of strengths, n of them.
        rises: whether the score rises with the strength.

    Returns:
        The density on the same grid; widths of the curve and noise of the scores are integrated out.

    Raises:
        DataError: the target is not between 0 and 1.
    """
    _check_target(target)
    tried = torch.tensor([one.strength for one in tries], dtype=torch.float64)
    scores = torch.tensor([one.score for one in tries], dtype=torch.float64)
    widths = torch.tensor(WIDTHS, dtype=torch.float64) * float(prior.grid[-1] - prior.grid[0])
    away = (tried - prior.grid[:, None, None]) / widths[:, None]  # [n, widths, tries]
    slope = 1.0 if rises else -1.0
    means = torch.sigmoid(slope * away + math.log(target / (1.0 - target)))
    errors = (scores - means).square().sum(-1) + NOISE_SCORES * NOISE**2
    likelihood = -0.5 * (len(tried) + NOISE_SCORES) * errors.log()
    density = prior.density * torch.exp(likelihood - likelihood.max()).sum(-1)
    return replace(prior, density=density / density.sum())


def _check_target(target: float) -> None:
    if not 0.0 < target < 1.0:
        raise DataError(f"target {target:g}: give a score strictly between 0 and 1")
