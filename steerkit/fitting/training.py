"""The one optimisation loop: a few parameters, a loss over items, small batches, and the best state kept."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from steerkit._support.progress import bar
from steerkit.errors import FitError
from steerkit.methods._subject import Schedule

__all__ = ["frozen", "minimise"]


def minimise(
    parameters: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    items: int,
    schedule: Schedule,
    *,
    judge: Callable[[], float] | None = None,
    progress: str | None = None,
) -> list[float]:
    """Train parameters in place with AdamW.

    Args:
        parameters: leaves that need gradients; left at their best state where there is a judge, else at the last.
        loss: from the indices [k] of a batch of items to a scalar.
        items: how many there are.
        schedule: how long and how fast.
        judge: asked after each epoch, without gradients; lower is better.
        progress: what a bar on stderr says; None shows none.

    Returns:
        The judgement after each epoch, or the mean loss where there is no judge.

    Raises:
        FitError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(schedule.seed)
    optimiser = torch.optim.AdamW(list(parameters), lr=schedule.rate, weight_decay=schedule.decay)
    history: list[float] = []
    best, kept, waited = math.inf, [parameter.detach().clone() for parameter in parameters], 0
    starts = range(0, items, schedule.batch_size)
    shown = _silent() if progress is None else bar(progress, schedule.epochs * len(starts))
    with shown as step:
        for _ in range(schedule.epochs):
            order, total = torch.randperm(items, generator=generator), 0.0
            for start in starts:
                batch = order[start : start + schedule.batch_size]
                optimiser.zero_grad()
                value = loss(batch)
                if not bool(torch.isfinite(value)):
                    raise FitError("training: the loss is not finite; load the model in float32, or lower the rate")
                value.backward()  # type: ignore[no-untyped-call]
                if schedule.clip is not None:
                    torch.nn.utils.clip_grad_norm_(list(parameters), schedule.clip)
                optimiser.step()
                total += float(value.detach()) * len(batch)
                step()
            with torch.no_grad():
                history.append(total / items if judge is None else judge())
            if judge is None:
                continue
            if history[-1] < best:
                best, kept, waited = history[-1], [parameter.detach().clone() for parameter in parameters], 0
            else:
                waited += 1
            if schedule.patience is not None and waited > schedule.patience:
                break
    if judge is not None:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
    return history


@contextlib.contextmanager
def _silent() -> Iterator[Callable[[], None]]:
    yield lambda: None


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of a model takes gradients meanwhile.

    Args:
        model: the model.
    """
    taking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in taking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)
