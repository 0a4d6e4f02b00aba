"""The search for a strength by its cost alone: what it finds on known curves, and what it does not trust."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from steerkit.errors import StrengthError
from steerkit.evaluate.kl_search import KlSearch

Curve = Callable[[float], float]


def search(kl: Curve, furthest: float = 64.0) -> KlSearch:
    return KlSearch(kl, furthest, advice="do something")


@pytest.mark.parametrize("first", [1e-4, 0.5, 50.0])
@pytest.mark.parametrize("kl", [lambda s: s**2, lambda s: 3 * s, lambda s: 1e-3 * s**4])
def test_what_is_found_spends_nine_tenths_of_the_budget(kl: Curve, first: float) -> None:
    found = search(kl).reaching(0.15, first)
    assert 0.9 * 0.15 <= kl(found.strength) <= 0.15
    assert found.kl == kl(found.strength)
    assert found.strength == float(f"{found.strength:.3g}")


def test_what_lies_beyond_a_strength_that_is_too_costly_is_not_trusted() -> None:
    # Cheap again from 2 on, as loops are.
    found = search(lambda s: 0.15 * s**2 if s < 2 else 0.14).reaching(0.15, 1.5)
    assert 0.9 <= found.strength <= 1.0


def test_logits_that_are_not_finite_are_an_end_and_the_furthest_strength_is_enough() -> None:
    found = search(lambda s: 0.1 * s**2 if s < 1 else math.inf).reaching(0.15, 8.0)
    assert 0.9 <= found.strength < 1.0
    assert search(lambda s: 0.02 * s, furthest=2.0).reaching(0.15, 0.5).strength == 2.0


def test_a_second_budget_goes_on_from_what_is_known() -> None:
    tried: list[float] = []

    def kl(strength: float) -> float:
        tried.append(strength)
        return strength**2

    both = search(kl)
    low, high = both.reaching(0.15, 0.1), both.reaching(0.3, 0.1)
    assert low.strength < high.strength
    assert len(tried) == len(set(tried))


def test_nothing_near_the_budget_is_refused_with_what_to_do() -> None:
    with pytest.raises(StrengthError, match=r"near 0\.15 was found: 64 gives 0; do something"):
        search(lambda s: 0.0).reaching(0.15, 0.5)
    with pytest.raises(StrengthError, match="gives inf; do something"):
        search(lambda s: math.inf).reaching(0.15, 0.5)
