"""What a row at the neutral strength beside another is: the unsteered one's bits, save where experts are routed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from steerkit.checks.contract import neutral_strength_is_the_identity
from steerkit.network.decoder import find_decoder
from steerkit.network.tap import routes_tokens
from tests.families import build


def drifting(family: str, off: float) -> Any:
    """A fitted method whose neutral rows come out `off` the unsteered ones, of values up to 1, beside another row."""
    logits = torch.linspace(-1, 1, 30, dtype=torch.float32).view(3, 2, 5)

    def computed(_ids: Tensor, _mask: Tensor, _vector: object, strength: Any = None) -> Tensor:
        return logits + off if isinstance(strength, list) else logits

    rows = torch.ones(3, 2, dtype=torch.long)
    return SimpleNamespace(
        method=SimpleNamespace(neutral_strength=0.0),
        model=build(family),
        rows=lambda: (rows, rows),
        logits=computed,
        vector=None,
        strength=1.0,
    )


@pytest.mark.parametrize(("family", "routed"), [("llama", False), ("qwen3_moe", True), ("mixtral", True)])
def test_neutral_rows_are_off_by_rounding_only_where_experts_are_routed(family: str, routed: bool) -> None:
    assert routes_tokens(find_decoder(build(family))) is routed
    neutral_strength_is_the_identity(drifting(family, 0.0))
    for off, allowed in ((1e-6, routed), (1e-4, False)):
        if allowed:
            neutral_strength_is_the_identity(drifting(family, off))
        else:
            with pytest.raises(AssertionError, match="neutral rows beside another are not"):
                neutral_strength_is_the_identity(drifting(family, off))
