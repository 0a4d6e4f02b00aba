"""Whether what is written out is what the hooks do: rounding passes on any processor, a wrong edit does not."""

from __future__ import annotations

from typing import Any

import pytest

import steerkit
from steerkit.export.verification import expected, logits_of, verify
from tests.methods.test_weights_of_methods import edit


# The delta rule of Qwen3-Next makes much of every rounding, Llama little.
@pytest.fixture(scope="module", params=["llama", "qwen3_next"])
def fitted(request: pytest.FixtureRequest) -> Any:
    model, vector = edit(request.param)
    return model, vector, expected(model, None, [vector], 1.0)


def test_the_edit_in_the_weights_holds(fitted: Any) -> None:
    model, vector, wanted = fitted
    with steerkit.edited(model, vector, 1.0):
        found = verify(logits_of(model, wanted.ids), wanted)
    assert found.holds, found.sentence()
    assert found.allowed < 0.01 * found.effect


@pytest.mark.parametrize("strength", [0.0, 0.99, 1.01, -1.0])
def test_another_strength_does_not_hold(fitted: Any, strength: float) -> None:
    model, vector, wanted = fitted
    with steerkit.steer(model, vector, strength):
        found = verify(logits_of(model, wanted.ids), wanted)
    assert not found.holds
    assert "times that is allowed" in found.sentence()
