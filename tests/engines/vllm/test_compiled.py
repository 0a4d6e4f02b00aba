"""vLLM's default mode: one compiled graph, traced before any request is steered, is right for all of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.vllm.asked import every_edit, gated, prompt
from tests.engines.vllm.engine import addresses
from tests.engines.vllm.models import FAMILIES

OPTIONS = {"enforce_eager": False, "max_num_batched_tokens": 64}
pytestmark = pytest.mark.parametrize(
    "pair", [{"family": family, **OPTIONS} for family in FAMILIES], indirect=True, ids=FAMILIES
)


def test_every_edit(pair: Any) -> None:
    assert pair.runner._steerkit._graphed
    asked = every_edit((5, 9, 65, 17))  # chunks of 64: one token is left of 65
    pair.check(asked, pair.answers(asked))


def test_no_address_of_the_graph_changes(pair: Any) -> None:
    before = addresses(pair.runner._steerkit)
    asked = every_edit((5, 9))
    pair.answers(asked, 2)
    assert not pair.runner._steerkit._outgrown
    assert addresses(pair.runner._steerkit) == before


def test_gates(pair: Any) -> None:
    asked = gated()
    pair.check(asked, pair.answers(asked))


def test_prefixes(pair: Any) -> None:
    long = prompt(77, 135)
    for said in (None, "add-post*1", None, "add-post@response*1", None):
        pair.check([(long, said)], pair.answers([(long, said)]))


def test_plain_rows_are_bitwise_those_of_a_plain_batch(pair: Any) -> None:
    asked = [(prompt(number, 9), None) for number in range(8)]
    mixed = [(ids, None if number % 2 else "turn-post*70 + add-mlp*1") for number, (ids, _) in enumerate(asked)]
    plain, beside = pair.answers(asked), pair.answers(mixed)
    assert all(plain[row] == beside[row] for row in range(1, 8, 2))
    assert all(plain[row] != beside[row] for row in range(0, 8, 2))
