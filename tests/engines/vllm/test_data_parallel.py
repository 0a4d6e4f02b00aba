"""Two engines of one server, each with a model of its own: whichever takes a request steers it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from steerkit.engines.vllm.settings import KINDS
from tests.engines.vllm import models
from tests.engines.vllm.asked import every_edit, gated
from tests.engines.vllm.engine import Asked, Pair, answer_of


class _Served(Pair):
    """vLLM's asynchronous engine, as its server has it, beside transformers."""

    def __init__(self, path: Path, model: Any, known: Any, vectors: Path, **options: Any) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs

        self.model, self.known, self.vectors, self._wanted = model, known, vectors, {}
        self.vectors.mkdir(exist_ok=True)
        for name, vector in known.items():
            vector.save(self.vectors / f"{name}.safetensors")
        self.args = AsyncEngineArgs(
            str(path),
            dtype="float32",
            seed=0,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=8,
            max_num_batched_tokens=512,
            block_size=32,
            additional_config={"steerkit": {"folder": str(self.vectors), "kinds": list(KINDS)}},
            **options,
        )

    async def served(self, asked: Sequence[Asked]) -> tuple[list[Any], list[int]]:
        """Answers, and how many requests each engine took."""
        from vllm.v1.engine.async_llm import AsyncLLM

        engine = AsyncLLM.from_engine_args(self.args)
        taken: list[int] = []
        choose = engine.engine_core.get_core_engine_for_request

        def chosen(request: Any) -> Any:
            core = choose(request)
            taken.append(int.from_bytes(core, "little"))
            return core

        engine.engine_core.get_core_engine_for_request = chosen

        async def one(number: int, prompt: Sequence[int], said: str | None) -> Any:
            given = {"prompt_token_ids": list(prompt)}, self.params(said, 6), str(number)
            return answer_of([output async for output in engine.generate(*given)][-1])

        try:
            return list(await asyncio.gather(*(one(n, *each) for n, each in enumerate(asked)))), taken
        finally:
            engine.shutdown()


@pytest.mark.slow
def test_two_engines(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    path = models.saved("llama", place)
    model = models.loaded(path)
    pair = _Served(path, model, models.vectors(model), place / "llama-vectors", data_parallel_size=2)
    asked = [*every_edit((5, 9, 2, 17)), *gated()]
    answers, taken = asyncio.run(pair.served(asked))
    assert len(set(taken)) == 2
    pair.check(asked, answers)
