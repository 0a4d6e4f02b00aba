"""The rule behind tolerances: no smaller than rounding is, and far smaller than a fault."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import modes, tolerances
from tests.families import FAMILIES, build

# Their products of experts exist in half precision and float32 only.
GROUPED = ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_next")
IDS = torch.tensor([modes.LONG, modes.LONG[::-1]])


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(GROUPED)))
def test_float32_is_as_far_from_float64_as_the_rule_says(family: str) -> None:
    """The error of a pass is measured against a precision in which there is next to none."""
    model = build(family)
    with torch.no_grad():
        found, exact = model(IDS, use_cache=False).logits, copy.deepcopy(model).double()(IDS, use_cache=False).logits
    assert float((found.double() - exact).abs().max() / exact.abs().max()) <= tolerances.tolerance(model, IDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tolerance_hides_a_hundredth_of_a_strength(family: str) -> None:
    model = build(family)
    vector = modes.vector_for(model, scope="all")
    with torch.no_grad():
        right, wrong = (modes.run_steered(model, "cached", vector, strength)[0][1] for strength in (1.0, 1.01))
    assert tolerances.of_family(family) < tolerances.gap(wrong, right)
