"""One vLLM beside one transformers model: what both answer, steered alike."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import steerkit
from steerkit.composition.terms import Composition
from steerkit.engines.vllm.settings import KINDS
from steerkit.vector.steering_vector import SteeringVector
from tests.engines.vllm import models

TOLERANCE = 1e-4
Asked = tuple[Sequence[int], str | None]
Answer = tuple[list[int], list[float]]


class Pair:
    """A vLLM engine and a transformers model of the same weights, with the same vectors by name."""

    @classmethod
    def of(cls, family: str, folder: Path, **options: Any) -> Pair:
        """A tiny random model of a family."""
        path = models.saved(family, folder)
        model = models.loaded(path)
        return cls(path, model, models.vectors(model), folder / f"{family}-vectors", **options)

    def __init__(self, path: Path, model: Any, known: dict[str, SteeringVector], vectors: Path, **options: Any) -> None:
        from vllm import LLM

        self.model, self.known, self.vectors = model, known, vectors
        self.vectors.mkdir(exist_ok=True)
        for name, vector in self.known.items():
            vector.save(self.vectors / f"{name}.safetensors")
        given = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 512, "block_size": 32}
        settings = {"folder": str(self.vectors), "kinds": list(KINDS), **options.pop("steerkit", {})}
        self.llm = LLM(
            str(path),
            dtype="float32",
            seed=0,
            skip_tokenizer_init=True,
            disable_log_stats=False,
            additional_config={"steerkit": settings},
            **{**given, "enforce_eager": True, **options},
        )
        self._wanted: dict[tuple[tuple[int, ...], str | None, int], Answer] = {}

    def params(self, steering: Any, count: int, **more: Any) -> Any:
        """Greedy sampling with the steering of one request."""
        from vllm import SamplingParams

        extra = {} if steering is None else {"extra_args": {"steering": steering}}
        wanted = {"temperature": 0, "ignore_eos": True, "detokenize": False, "logprobs": 0}
        return SamplingParams(max_tokens=count, **wanted, **extra, **more)

    def answers(self, asked: Sequence[Asked], count: int = 6) -> list[Answer]:
        """What vLLM answers to requests that are there together."""
        prompts: Any = [{"prompt_token_ids": list(prompt)} for prompt, _ in asked]
        outputs = self.llm.generate(prompts, [self.params(said, count) for _, said in asked], use_tqdm=False)
        return [answer_of(output) for output in outputs]

    def wanted(self, prompt: Sequence[int], steering: str | None, count: int = 6) -> Answer:
        """What transformers answers to one request, steered by hooks."""
        key = (tuple(prompt), steering, count)
        if key not in self._wanted:
            ids = torch.tensor([list(prompt)])
            chosen: Any = contextlib.nullcontext()
            if steering is not None:
                chosen = steerkit.steer(self.model, Composition.parse(steering).vectors(self.known))
            with chosen, torch.no_grad():
                found = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=count,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            tokens = found.sequences[0, len(prompt) :].tolist()
            logs = [float(row[0].log_softmax(-1)[token]) for row, token in zip(found.logits, tokens, strict=True)]
            self._wanted[key] = tokens, logs
        return self._wanted[key]

    def check(self, asked: Sequence[Asked], answers: Sequence[Answer], count: int = 6) -> None:
        """Hold what vLLM answered to what transformers answers."""
        for (prompt, steering), (tokens, logs) in zip(asked, answers, strict=True):
            wanted, known = self.wanted(prompt, steering, count)
            assert tokens == wanted, f"{steering} on {len(prompt)} tokens: {tokens} and not {wanted}"
            gap = max(abs(one - other) for one, other in zip(logs, known, strict=True))
            assert gap < TOLERANCE, f"{steering} on {len(prompt)} tokens: log-probabilities differ by {gap}"

    def add(self, name: str, vector: SteeringVector) -> Path:
        """Another vector for both."""
        self.known[name] = vector
        return vector.save(self.vectors / f"{name}.safetensors")

    @property
    def runner(self) -> Any:
        """vLLM's, which runs in this process."""
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    @property
    def scheduler(self) -> Any:
        """vLLM's."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def close(self) -> None:
        """Let the engine go, so that another one can start in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answer_of(output: Any) -> Answer:
    """Tokens and their log-probabilities."""
    (found,) = output.outputs
    tokens = list(found.token_ids)
    return tokens, [place[token].logprob for place, token in zip(found.logprobs, tokens, strict=True)]


def addresses(steerer: Any) -> dict[str, int]:
    """Where everything lies that a graph of a steered model reads."""
    board, schedule = steerer._board, steerer._schedule
    found = {f"board.{name}": value for name, value in vars(board).items()}
    found |= {f"schedule.{name}": value for name, value in vars(schedule).items()}
    for point in steerer._points.values():
        found |= {f"{point.site}.{name}": value for name, value in vars(point).items()}
    return {name: value.data_ptr() for name, value in found.items() if isinstance(value, torch.Tensor)}
