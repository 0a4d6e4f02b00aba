"""The formulas, beside their slow obvious forms; and traps: what fails never improves a score."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerkit.evaluate.intervals import Estimate
from steerkit.evidence.formulas import Scores, change, fluency, instruction, mean, overall, verdict, winner

share = st.floats(0, 1)


@given(share, share, share)
def test_overall_is_the_harmonic_mean(concept: float, fluent: float, fits: float) -> None:
    found = overall(concept, fluent, fits)
    if 0 in (concept, fluent, fits):
        assert found == 0
    elif min(concept, fluent, fits) > 1e-300:
        assert found == pytest.approx(statistics.harmonic_mean([concept, fluent, fits]))
    assert 0 <= found <= 1


def test_fluency_is_one_for_the_unsteered_answer_and_zero_for_its_words_in_any_order() -> None:
    assert fluency(1.2, 1.2, 4.0, 0.0) == 1
    assert fluency(5.2, 1.2, 4.0, 0.0) == 0
    assert fluency(9.9, 1.2, 4.0, 0.0) == 0
    assert fluency(0.3, 1.2, 4.0, 0.0) == 1, "a loop is predictable, and no better than the unsteered answer"
    assert fluency(2.2, 1.2, 4.0, 0.5) == pytest.approx((1 - 1 / 4) * (1 - 0.5))


@given(st.floats(-50, 50), st.floats(0.01, 3), st.floats(-3, 3))
def test_instruction_is_the_logistic_function(z: float, slope: float, offset: float) -> None:
    odds = math.exp(slope * z + offset)
    assert instruction(z, slope, offset) == pytest.approx(odds / (1 + odds))


def test_instruction_of_extremes_is_a_number() -> None:
    assert instruction(1e9, 1, 0) == 1
    assert instruction(-1e9, 1, 0) < 1e-300


def scores(*concepts: float, failed: bool = False) -> list[Scores]:
    return [Scores(one, one, one, one, failed=failed) for one in concepts]


def test_a_change_is_the_mean_of_paired_differences() -> None:
    after, before = scores(0.9, 0.4, 0.7, 0.8), scores(0.1, 0.2, 0.4, 0.1)
    found = change(after, before, "concept")
    assert found.mean == pytest.approx(statistics.fmean([0.8, 0.2, 0.3, 0.7]))
    assert found.low < found.mean < found.high


def test_an_answer_that_failed_never_improves_a_change() -> None:
    whole, failed = Scores(0.9, 1, 1, 0.9), Scores(0, 0, 0, 0, failed=True)
    # Of the unsteered answer: it would count as the largest gain.
    assert change([whole, whole], [failed, failed], "concept") == Estimate(0, 0, 0)
    # Of the steered one: a loss stays a loss.
    assert change([failed, failed], [whole, whole], "concept").mean == pytest.approx(-0.9)
    # Of minus the strength, where less of the concept is wanted: the unsteered answer less the one that failed.
    assert change([whole, whole], [failed, whole], "concept").mean == 0


def test_the_mean_is_over_questions() -> None:
    assert mean([0.0, 0.5, 1.0]).mean == 0.5
    assert mean([1.0, 1.0, 0.0]).low < 0.2, "three answers say little"


RISES, FALLS, FLAT = Estimate(0.05, 0.01, 0.1), Estimate(-0.1, -0.2, -0.01), Estimate(-0.1, -0.2, 0.01)


@pytest.mark.parametrize(
    ("concept", "whole", "said"),
    [
        (Estimate(0.3, 0.1, 0.5), RISES, "shows"),
        (Estimate(0.3, 0.1, 0.5), FLAT, "shows"),
        (Estimate(0.3, 0.1, 0.5), FALLS, "weak"),
        (Estimate(0.14, 0.1, 0.2), RISES, "weak"),
        (Estimate(0.3, 0.0, 0.6), RISES, "nothing"),
        (Estimate(-0.3, -0.5, -0.1), RISES, "nothing"),
        (Estimate(math.nan, math.nan, math.nan), RISES, "nothing"),
    ],
)
def test_the_verdict_is_the_stated_rule(concept: Estimate, whole: Estimate, said: str) -> None:
    assert verdict(concept, whole) == said


def test_who_wins_is_told_where_the_interval_says_it() -> None:
    assert winner(Estimate(0.1, 0.01, 0.2)) == "steering"
    assert winner(Estimate(-0.1, -0.2, -0.01)) == "prompting"
    assert winner(Estimate(0.1, -0.01, 0.2)) == "cannot be told"
