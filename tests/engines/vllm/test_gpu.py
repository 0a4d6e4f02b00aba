"""On an accelerator: as Python, compiled, and in captured graphs, steered requests are those of transformers.

The model runs in float32. Needs CUDA, and vLLM's own package for it; skipped elsewhere.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.engines.vllm.asked import every_edit, gated, prompt
from tests.engines.vllm.engine import addresses
from tests.engines.vllm.models import FAMILIES

MODES = {
    "eager": {"enforce_eager": True},
    "compiled": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "NONE"}},
    "piecewise": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "graphs": {"enforce_eager": False},
}
PAIRS = {
    f"{family}-{mode}": {"family": family, "max_num_batched_tokens": 64, **options}
    for family in FAMILIES
    for mode, options in MODES.items()
}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.parametrize("pair", list(PAIRS.values()), indirect=True, ids=list(PAIRS)),
]
# vLLM's second model runner, which it takes there by itself, is not steered.
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")


def test_it_runs_there(pair: Any) -> None:
    assert pair.runner.device.type == "cuda"
    assert pair.runner._steerkit._board.device.type == "cuda"


def test_every_edit(pair: Any) -> None:
    before = addresses(pair.runner._steerkit)
    asked = every_edit((5, 9, 65, 17))
    pair.check(asked, pair.answers(asked))
    assert addresses(pair.runner._steerkit) == before


def test_gates(pair: Any) -> None:
    asked = gated()
    pair.check(asked, pair.answers(asked))


def test_steps_of_every_size_that_is_captured(pair: Any) -> None:
    for count in range(1, 9):
        asked = [
            (prompt(number, 5 + number), (None, "add-post*1", "off-attn*1")[number % 3]) for number in range(count)
        ]
        pair.check(asked, pair.answers(asked))


def test_a_step_does_not_wait_for_the_device(pair: Any) -> None:
    asked = [(prompt(number, 9), "turn-post*40 + add-mlp*1") for number in range(8)]
    steerer, run = pair.runner._steerkit, type(pair.runner._steerkit).run

    def watched(one: Any, step: Any, extra: Any, forward: Any) -> Any:
        def free() -> Any:  # what vLLM itself waits for is no matter of ours
            torch.cuda.set_sync_debug_mode("default")
            try:
                return forward()
            finally:
                torch.cuda.set_sync_debug_mode("error")

        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(one, step, extra, free)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(steerer), "run", watched)
        answers = pair.answers(asked)
    pair.check(asked, answers)
