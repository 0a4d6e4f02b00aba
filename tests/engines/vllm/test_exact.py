"""Tokens and log-probabilities are those of transformers with hooks: every edit and scope, alone and in any mix."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.vllm.asked import every_edit, gated
from tests.engines.vllm.models import FAMILIES

pytestmark = pytest.mark.parametrize("pair", [{"family": family} for family in FAMILIES], indirect=True, ids=FAMILIES)


def test_mixed_batches_of_eight(pair: Any) -> None:
    asked = every_edit((5, 9, 2, 17))
    pair.check(asked, pair.answers(asked))


def test_alone(pair: Any) -> None:
    for one in every_edit((5, 9, 2, 17))[::5]:
        pair.check([one], pair.answers([one]))


def test_gates(pair: Any) -> None:
    asked = gated()
    pair.check(asked, pair.answers(asked))
    plain = {tuple(prompt): pair.wanted(prompt, None) for prompt, _ in asked}
    opened = [pair.wanted(prompt, said) != plain[tuple(prompt)] for prompt, said in asked if said in ("late", "mean")]
    assert any(opened)
    assert not all(opened)
