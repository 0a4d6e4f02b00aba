"""How much longer generating takes under steering."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from steerkit.evaluate.intervals import Estimate, interval
from steerkit.evaluate.trial import Trial
from steerkit.network.decoder import execution_device

__all__ = ["decoding_overhead"]


def decoding_overhead(trial: Trial, *, pairs: int = 9, tokens: int = 24, prompts: int = 1) -> Estimate:
    """Time of generating under steering over that of generating without.

    Steered and unsteered runs take turns (A B, B A, ...), so that what else the machine does falls on both alike.

    Args:
        trial: the model under steering.
        pairs: runs of each kind.
        tokens: new tokens of every run.
        prompts: rows of the batch.

    Returns:
        The median ratio, with the interval of the mean log-ratio around it, as ratios.
    """
    asked = trial.setup.asked[:prompts]
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    sides = (trial, trial.baseline)
    for side in sides:  # what is done once, such as placing tensors, is not the price of a token
        side.answer(asked, **options)
    ratios = []
    for number in range(pairs):
        order: Sequence[int] = (0, 1) if number % 2 == 0 else (1, 0)
        seconds = [0.0, 0.0]
        for place in order:
            _settle(trial)
            start = time.perf_counter()
            sides[place].answer(asked, **options)
            _settle(trial)
            seconds[place] = time.perf_counter() - start
        ratios.append(seconds[0] / seconds[1])
    spread = interval(torch.tensor(ratios, dtype=torch.float32).log()).exp()
    middle = statistics.median(ratios)
    return Estimate(middle, min(spread.low, middle), max(spread.high, middle))


def _settle(trial: Trial) -> None:
    """Wait for the accelerator, if there is one."""
    device = execution_device(trial.setup.decoder)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
