"""Intervals hold what they state: coverage in simulations, against the textbook intervals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from steerkit.errors import DataError
from steerkit.evaluate.intervals import Estimate, interval
from tests.pairwise import pairwise

RUNS = 1500


def student(values: Tensor) -> tuple[float, float]:
    """The textbook interval of a mean."""
    n, mean, spread = len(values), float(values.mean()), float(values.std())
    reach = float(stats.t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    return mean - reach, mean + reach


def clopper_pearson(values: Tensor) -> tuple[float, float]:
    """The exact interval of a share."""
    found = stats.binomtest(int(values.sum()), len(values)).proportion_ci(0.95, method="exact")
    return float(found.low), float(found.high)


def shares(rate: float) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, generator: (torch.rand(n, generator=generator, dtype=torch.double) < rate).double()


# What is drawn, and its true mean.
CONTINUOUS: dict[str, tuple[Callable[[int, torch.Generator], Tensor], float]] = {
    "normal": (lambda n, g: torch.randn(n, generator=g, dtype=torch.double) + 0.3, 0.3),
    "skewed": (lambda n, g: -torch.rand(n, generator=g, dtype=torch.double).log(), 1.0),
    "heavy tails": (
        lambda n, g: torch.from_numpy(stats.t.ppf(torch.rand(n, generator=g, dtype=torch.double).numpy(), 3)),
        0.0,
    ),
    "uniform": (lambda n, g: torch.rand(n, generator=g, dtype=torch.double), 0.5),
}


def simulate(
    draw: Callable[[int, torch.Generator], Tensor],
    truth: float,
    n: int,
    reference: Callable[[Tensor], tuple[float, float]],
) -> tuple[float, float]:
    """Share of runs in which the interval holds the true mean, and its mean width over the reference's."""
    generator = torch.Generator().manual_seed(0)
    held, width, expected = 0, 0.0, 0.0
    for run in range(RUNS):
        values = draw(n, generator)
        found = interval(values, draws=400, seed=run)
        low, high = reference(values)
        held += found.low <= truth <= found.high
        width += found.high - found.low
        expected += high - low
    return held / RUNS, width / expected


@pytest.mark.parametrize(("name", "n"), pairwise(list(CONTINUOUS), [24, 96], strength=1))
def test_coverage_of_continuous_scores(name: str, n: int) -> None:
    draw, truth = CONTINUOUS[name]
    coverage, width = simulate(draw, truth, n, student)
    assert coverage >= 0.93
    assert width <= 1.2


@pytest.mark.parametrize("n", [24, 96])
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_coverage_of_shares(rate: float, n: int) -> None:
    """Exact, not simulated: every number of hits with its probability."""
    held = width = expected = 0.0
    for hits in range(n + 1):
        values = torch.tensor([1.0] * hits + [0.0] * (n - hits))
        found, probability = interval(values), float(stats.binom.pmf(hits, n, rate))
        low, high = clopper_pearson(values)
        held += probability * (found.low <= rate <= found.high)
        width += probability * (found.high - found.low)
        expected += probability * (high - low)
    assert held >= 0.93
    assert width <= 1.2 * expected


@pytest.mark.parametrize(
    ("rates", "n"), pairwise([(0.05, 0.05), (0.05, 0.4), (0.5, 0.5), (0.5, 0.9)], [24, 96], strength=1)
)
def test_coverage_of_changes_of_shares(rates: tuple[float, float], n: int) -> None:
    """The same items before and after; half of them are alike by nature."""
    generator = torch.Generator().manual_seed(2)
    held = 0
    for _ in range(RUNS):
        shared = torch.rand(n, generator=generator)
        own = torch.rand(n, generator=generator)
        before = (shared < rates[0]).double()
        after = (torch.where(torch.rand(n, generator=generator) < 0.5, shared, own) < rates[1]).double()
        found = interval(after, before=before)
        held += found.low <= rates[1] - rates[0] <= found.high
    assert held / RUNS >= 0.93


def test_unchanged_items_have_no_spread_unless_they_are_shares() -> None:
    values = torch.tensor([0.25, 0.5, 0.0, 0.75])
    assert interval(values, before=values) == (0.0, 0.0, 0.0)
    shares = torch.tensor([0.0, 1.0, 0.0, 0.0])
    found = interval(shares, before=shares)
    assert found.mean == 0.0
    assert found.low < -0.2
    assert found.high > 0.2
    with pytest.raises(DataError, match="3 items under steering and 2 without"):
        interval(torch.rand(3), before=torch.rand(2))


def test_weighted_coverage() -> None:
    """Token-weighted means: long items count for more, and the true mean is theirs."""
    generator = torch.Generator().manual_seed(1)
    held = 0
    for run in range(RUNS):
        weights = torch.randint(5, 60, (40,), generator=generator).double()
        values = torch.randn(40, generator=generator, dtype=torch.double) / weights.sqrt() + 0.2
        found = interval(values, weights=weights, draws=400, seed=run)
        held += found.low <= 0.2 <= found.high
    assert held / RUNS >= 0.93


def test_shares_are_wilson_s() -> None:
    for hits, n in ((0, 24), (1, 24), (12, 24), (96, 96)):
        expected = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
        found = interval(torch.tensor([1.0] * hits + [0.0] * (n - hits)))
        assert found == pytest.approx((hits / n, expected.low, expected.high), abs=1e-9)


def test_an_interval_is_the_mean_of_student_s_and_of_the_bootstrap_s() -> None:
    values = torch.tensor([0.1, 0.4, -0.2, 1.5, 0.3, 0.8, 0.0, 2.5])
    generator = torch.Generator().manual_seed(7)
    picks = torch.randint(8, (300, 8), generator=generator)
    mean, error = float(values.double().mean()), float(values.double().std()) / math.sqrt(8)
    steps = []
    for row in picks.tolist():
        again = values.double()[row]
        steps.append((float(again.mean()) - mean) / (float(again.std()) / math.sqrt(8)))
    low, high = stats.mstats.mquantiles(steps, [0.025, 0.975], alphap=1, betap=1)
    ends = student(values.double())
    found = interval(values, draws=300, seed=7)
    assert found.low == pytest.approx((ends[0] + mean - high * error) / 2)
    assert found.high == pytest.approx((ends[1] + mean - low * error) / 2)
    assert interval(values, draws=300, seed=7) == found, "the same seed gives the same interval"
    scaled = interval(values * 3, weights=torch.full((8,), 2.0), draws=300, seed=7)
    assert scaled == pytest.approx([3 * end for end in found]), "units and even weights do not matter"


def test_edges() -> None:
    assert interval(torch.full((5,), 0.7)) == pytest.approx((0.7, 0.7, 0.7))
    assert interval(torch.tensor([2.5])) == Estimate(2.5, -math.inf, math.inf)
    assert interval(torch.tensor([0.2, math.nan, 0.4, 0.9])) == interval(torch.tensor([0.2, 0.4, 0.9]))
    for bad in (torch.tensor([]), torch.tensor([math.nan]), torch.tensor([1.0, math.inf])):
        with pytest.raises(DataError, match="items"):
            interval(bad)
    with pytest.raises(DataError, match="weights"):
        interval(torch.tensor([1.0, 2.0]), weights=torch.tensor([1.0, 0.0]))
    assert Estimate(0.0, -1.0, 1.0).exp() == pytest.approx((1.0, math.exp(-1), math.e))
