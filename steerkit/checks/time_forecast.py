"""Seconds that steered generation takes, measured on a few short passes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from steerkit.network.decoder import Decoder, execution_device, inner_model
from steerkit.steering.steering import steer
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Time", "forecast_time"]

TIMED_PROMPT = 16
TIMED_STEPS = 5
ROUNDS = 2


@dataclass(frozen=True)
class Time:
    """A forecast in seconds, from passes over a short prompt, for one batch.

    Attributes:
        prefill: the pass over the prompt, unsteered.
        step: one decoding step, unsteered.
        steered_prefill: the pass over the prompt, steered.
        steered_step: one decoding step, steered.
        total: prompt and answer, unsteered.
        steered_total: prompt and answer, steered.
    """

    prefill: float
    step: float
    steered_prefill: float
    steered_step: float
    total: float
    steered_total: float


class _Stopwatch:
    """What `generate` streams to: notes when the prompt was taken and when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _value: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing comes after the last token."""


def forecast_time(
    model: nn.Module,
    decoder: Decoder,
    vectors: Sequence[SteeringVector],
    options: dict[str, Any],
    rows: int,
    prompt: int,
    new: int,
) -> Time:
    """Generate a few tokens, steered and not in turns, after a first run that is not counted."""
    short = min(prompt, TIMED_PROMPT)
    columns = torch.arange(short, device=execution_device(decoder)) % 100 + 1
    ids = columns.expand(rows, -1)
    runner: Any = model if hasattr(model, "generate") else inner_model(model)
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for turn in range(1 + ROUNDS):
        for steered in (False, True):
            with steer(model, vectors, **options) if steered else contextlib.nullcontext():
                measured = _generate(runner, ids)
            if turn:
                found[steered].append(measured)
    prefill, step = (statistics.median(column) for column in zip(*found[False], strict=True))
    steered_prefill, steered_step = (statistics.median(column) for column in zip(*found[True], strict=True))
    prefill, steered_prefill = (value * prompt / short for value in (prefill, steered_prefill))
    return Time(
        prefill=prefill,
        step=step,
        steered_prefill=steered_prefill,
        steered_step=steered_step,
        total=prefill + (new - 1) * step,
        steered_total=steered_prefill + (new - 1) * steered_step,
    )


def _generate(runner: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of the pass over the prompt, and of one decoding step."""
    watch = _Stopwatch()
    with torch.no_grad():
        runner.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1 + TIMED_STEPS,
            min_new_tokens=1 + TIMED_STEPS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=1,
            pad_token_id=0,
            streamer=watch,
        )
    gaps = [later - earlier for earlier, later in zip(watch.times, watch.times[1:], strict=False)]
    return gaps[0], statistics.median(gaps[1:])
