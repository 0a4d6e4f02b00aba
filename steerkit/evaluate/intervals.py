"""Intervals for means over items."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steerkit.errors import DataError

__all__ = ["Estimate", "bootstrap"]


class Estimate(NamedTuple):
    """A mean with its interval.

    Attributes:
        mean: over items.
        low: lower end of the interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def bootstrap(values: Tensor, *, level: float = 0.95, draws: int = 4000, seed: int = 0) -> Estimate:
    """Percentile bootstrap interval of a mean over items.

    Args:
        values: [n], one per item.
        level: share of the interval, 0.95 for 95 %.
        draws: resamples.
        seed: fixes them.

    Raises:
        DataError: there are no items, or a value is not finite.
    """
    values = values.double().flatten()
    if len(values) == 0 or not bool(torch.isfinite(values).all()):
        raise DataError(f"bootstrap: got {len(values)} items, all of which have to be finite numbers")
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values[picks].mean(dim=1)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
    return Estimate(float(values.mean()), low, high)
