"""Two ranks steer as one does: each has the whole residual stream."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.vllm.asked import every_edit, gated

ENGINE = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.mark.slow
def test_two_ranks(pair: Any) -> None:
    for asked in (every_edit((5, 9, 2, 17)), gated()):
        pair.check(asked, pair.answers(asked))
