"""How long activations are at a site, over the tokens read: their median norm, and their spread.

`norm` is the median length of a token. Where a few dimensions are massive it says little: in Gemma 3 270M one of 640
holds up to nine tenths of every squared norm and hardly differs between tokens. `spread` is what such a dimension
cannot move: the standard deviation over tokens of the median dimension, times the root of the width. It is what
`unit="norm"` counts in; docs/results/norms.md compares it with others.

Massive activations: Sun et al. (2024), "Massive Activations in Large Language Models", arXiv 2402.17762.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from steerkit.activations.moments import NormMedian

__all__ = ["MASSIVE", "TokenScale", "TokenScales"]

MASSIVE = 100.0
"""A dimension is massive where its mean square is more than so many times the median dimension's."""
_SHARE = 0.05
"""Massive dimensions that hold less than this share of the mean squared norm are not told."""


class TokenScale(NamedTuple):
    """How long activations are at one site, without pads and each row's first token.

    Attributes:
        norm: the median token norm.
        spread: the standard deviation over tokens of the median dimension, times the root of the width.
        massive: by dimension the share of the mean squared norm that it holds, for the few that hold most.
    """

    norm: float
    spread: float
    massive: Mapping[int, float]


class TokenScales:
    """Takes the tokens of one site pass by pass; holds a mean and a variance per dimension, and no token."""

    def __init__(self) -> None:
        self._norms = NormMedian()
        self._count: Tensor | None = None
        self._mean = self._power = torch.empty(0)

    def update(self, h: Tensor, counted: Tensor) -> None:
        """Count the tokens of a pass.

        Args:
            h: [b, t, d] activations.
            counted: [b, t] float32, 1 where the token counts and 0 where it is a pad or a row's first token.
        """
        self._norms.update(h, counted)
        with torch.autocast(h.device.type, enabled=False):
            # Times zero would keep what is not finite on pads.
            rows = torch.where(counted[..., None] > 0, h, 0.0).flatten(0, 1).float()
            weights = counted.flatten()
            new = weights.sum()
            mean = weights @ rows / new.clamp_min(1.0)
            power = weights @ (rows - mean).square()
            if self._count is None:
                self._count, self._mean, self._power = new, mean, power
                return
            # Chan's update; a pass without a token that counts changes nothing.
            total = self._count + new
            share = new / total.clamp_min(1.0)
            step = mean - self._mean
            self._power = self._power + power + step.square() * (self._count * share)
            self._mean = self._mean + step * share
            self._count = total

    def result(self) -> TokenScale:
        """The scale; its numbers are nan where no token was counted."""
        if self._count is None or float(self._count) == 0:
            return TokenScale(self._norms.result(), math.nan, {})
        variance = self._power / self._count
        square = variance + self._mean.square()
        shares = square / square.sum()
        told = (square > MASSIVE * square.median()) & (shares >= _SHARE)
        return TokenScale(
            norm=self._norms.result(),
            spread=math.sqrt(float(variance.median()) * len(variance)),
            massive={int(place): float(shares[place]) for place in told.nonzero()[:, 0]},
        )
