"""The command that tests a vLLM passes on one that steers, and fails on one that does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerkit.engines.vllm.steps import Steerer
from steerkit.engines.vllm.verify import CHECKS, verify
from tests.engines.vllm import models

OPTIONS = {
    "max_model_len": 512,
    "max_num_seqs": 8,
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
}


@pytest.fixture(autouse=True)
def _alone() -> Any:
    from vllm.distributed import cleanup_dist_env_and_memory

    yield
    cleanup_dist_env_and_memory()


def test_one_that_steers(place: Path) -> None:
    steps: list[int] = []
    found = verify(str(models.saved("llama", place)), options=OPTIONS, step=lambda: steps.append(1))
    assert [one.check for one in found] == list(CHECKS)
    # What it costs shows on models that have something to do.
    assert all(one.passed for one in found if one.check != "cost"), found
    assert len(steps) == len(CHECKS)


def test_one_that_does_not(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(_steerer: Steerer, _step: Any, _extra: Any, forward: Callable[[], Any]) -> Any:
        return forward()

    monkeypatch.setattr(Steerer, "run", plain)
    (found,) = verify(str(models.saved("llama", place)), options=OPTIONS)
    assert (found.check, found.passed) == ("steers", False)


def test_one_in_which_rows_mix(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Steerer.run

    def mixed(steerer: Steerer, step: Any, extra: Any, forward: Callable[[], Any]) -> Any:
        def shifted() -> Any:  # every token has what its neighbour should have
            board = steerer._board
            for tokens in (board.row, board.on, board.lead) if len(step.requests) > 1 else ():
                tokens.copy_(tokens.roll(1, dims=min(tokens.dim() - 1, 1)))
            return forward()

        return run(steerer, step, extra, shifted)

    monkeypatch.setattr(Steerer, "run", mixed)
    found = {
        one.check: one.passed for one in verify(str(models.saved("llama", place)), options=OPTIONS, compared=False)
    }
    assert found["steers"]
    assert not found["plain_is_plain"]
    assert not found["rows_are_apart"]
    assert "as_transformers" not in found


def test_one_that_reads_another_block(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steerkit.engines.vllm.points import Point

    init = Point.__init__

    def misplaced(point: Point, site: Any, *args: Any, **more: Any) -> None:
        init(point, site, *args, **more)
        point.site = type(site)((site.layer + 1) % models.BLOCKS, site.kind)

    monkeypatch.setattr(Point, "__init__", misplaced)
    found = {one.check: one.passed for one in verify(str(models.saved("llama", place)), options=OPTIONS)}
    assert found["steers"]
    assert not found["reads"]
    assert not found["as_transformers"]
