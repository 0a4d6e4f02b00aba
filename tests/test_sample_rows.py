"""Rows of the comparison that README shows, computed again on the model."""

from __future__ import annotations

from typing import Any

import pytest

import steerkit
from steerkit._support.shipped import recipes
from steerkit.evaluate.scorers.preference_margin import PreferenceMargin
from steerkit.evaluate.scoring import measure
from steerkit.evaluate.setup import Setup
from steerkit.recipe import Recipe
from tests.docs.results import comparisons


def row_of(model: str, method: str) -> dict[str, Any]:
    return next(row for row in comparisons()[model]["rows"] if row["method"] == method)


def assert_measured(model: str, loaded: tuple[Any, Any], method: str) -> None:
    """Fit a method as its recipe says where the table says, and measure its effect on the held-out items."""
    row = row_of(model, method)
    recipe = Recipe.load(recipes()[row["recipe"]])
    train, held_out = recipe.split(method)
    part = recipe.method_part(method)
    scope = recipe.apply.scope if part == recipe.method else None
    vector = steerkit.fit(
        *loaded,
        train,
        method=method,
        settings=dict(part.settings),
        sites=row["sites"],
        readout=part.readout,
    )
    trial = Setup(*loaded, held_out).trial(vector if scope is None else vector.at(scope=scope), row["strength"])
    found = measure(trial, [PreferenceMargin()])["preference_margin"]
    assert found.change is not None
    assert found.change.mean == pytest.approx(row["effect"]["mean"], abs=1e-3)


@pytest.mark.slow  # what the table was measured with is told by its digests every time
@pytest.mark.embedded
@pytest.mark.parametrize("method", ["actadd", "caa"])
def test_a_row_is_what_today_s_code_measures(method: str, embedded: tuple[Any, Any]) -> None:
    assert_measured("smollm2-135m", embedded, method)
