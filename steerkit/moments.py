"""Running statistics: what a method needs of the activations without keeping them."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from steerkit.errors import FitError

__all__ = ["Accumulator", "Means", "NormMedian"]


class Accumulator(Protocol):
    """Takes both sides of the data batch by batch; `result` is what `fit_site` receives."""

    def update(self, positive: Tensor, negative: Tensor) -> None:
        """Take one batch: positive [k, d] and negative [l, d], float32; both sides of a pair come together."""

    def result(self) -> tuple[Tensor, Tensor]:
        """What stands for the positive and for the negative side, [*, d] each."""


class Means:
    """The mean of each side, updated batch by batch without ever holding the samples.

    `result` gives each side as one row [1, d], whose mean is the side's mean.
    """

    def __init__(self) -> None:
        self._means: list[Tensor | None] = [None, None]
        self._counts = [0, 0]

    def update(self, positive: Tensor, negative: Tensor) -> None:
        """Move each mean towards the batch's rows.

        Args:
            positive: [k, d] float32, k may be 0.
            negative: [l, d] float32, l may be 0.
        """
        for side, rows in enumerate((positive, negative)):
            if rows.shape[0] == 0:
                continue
            self._counts[side] += rows.shape[0]
            mean = self._means[side]
            if mean is None:
                self._means[side] = rows.mean(dim=0)
            else:  # Chan's update: no large sums, so float32 is enough
                share = rows.shape[0] / self._counts[side]
                self._means[side] = mean + (rows.mean(dim=0) - mean) * share

    def result(self) -> tuple[Tensor, Tensor]:
        """The two means, [1, d] each, on the CPU.

        Raises:
            FitError: one side has no rows.
        """
        positive, negative = self._means
        if positive is None or negative is None:
            raise FitError("one side of the data has no rows")
        return positive[None].cpu(), negative[None].cpu()


class NormMedian:
    """The median token norm, from a histogram with bins 0.4 % wide, so that memory does not grow with the tokens.

    The median and not the mean: a few tokens of some models carry norms a thousand times the usual (arXiv 2402.17762).
    """

    _LOW, _HIGH, _BINS = -8.0, 8.0, 8192

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def update(self, h: Tensor, counted: Tensor) -> None:
        """Count the norms of a pass.

        Args:
            h: [b, t, d] activations.
            counted: [b, t] float32, 1 where the token counts and 0 where it is a pad or a row's first token.
        """
        if self._counts is None:
            self._counts = torch.zeros(self._BINS, device=h.device)
        norms = torch.linalg.vector_norm(h, dim=-1, dtype=torch.float32)
        place = (norms.clamp_min(10.0**self._LOW).log10() - self._LOW) / (self._HIGH - self._LOW)
        bins = (place.nan_to_num(1.0) * self._BINS).long().clamp(0, self._BINS - 1)
        self._counts.scatter_add_(0, bins.flatten(), counted.flatten().to(self._counts.device))

    def result(self) -> float:
        """The median norm (to 0.4 %); nan where no token was counted."""
        if self._counts is None or float(self._counts.sum()) == 0:
            return math.nan
        below = self._counts.cumsum(0)
        index = int(torch.searchsorted(below, below[-1] / 2))
        return float(10 ** (self._LOW + (index + 0.5) / self._BINS * (self._HIGH - self._LOW)))
