"""How long activations are at a site, over the tokens read: their median norm, and how far they spread.

Where a few dimensions are massive the norm says little: in Gemma 3 270M one of 640 holds up to nine tenths of every
squared norm and hardly differs between tokens. So `unit="norm"` counts in a spread, which depends on the direction u
(of length 1):

    common = sqrt(sum over j of s_j^2)              how far tokens lie from their mean
    own    = sqrt(d) / sqrt(sum over j of (u_j / s_j)^2)   the same, each dimension in its own standard deviation s_j
    spread = sqrt(common * own)

`common` is too much for a direction in quiet dimensions, `own` too little for one in loud ones; the mean of both moves
the predictions most alike over blocks, directions and models (docs/results/strengths.md).

Massive activations: Sun et al. (2024), "Massive Activations in Large Language Models", arXiv 2402.17762.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from steerkit.activations.moments import NormMedian

__all__ = [
    "MASSIVE",
    "MASSIVE_TOKEN",
    "Moments",
    "PassScale",
    "TokenScale",
    "TokenScales",
    "massive_tokens",
    "scale_of",
]

MASSIVE = 100.0
"""A dimension is massive where its mean square is more than so many times the median dimension's."""
MASSIVE_TOKEN = 10.0
"""A token is massive where its activation is more than so many times as long as the median one of its text."""
_SHARE = 0.05
"""Massive dimensions that hold less than this share of the mean squared norm are not told."""
_QUIETEST = 1e-3  # of the root mean variance


@dataclass(frozen=True, eq=False)
class TokenScale:
    """How long activations are at one site, without pads and each row's first token.

    Attributes:
        norm: the median token norm; nan where no token was counted.
        deviation: [d] standard deviation over tokens of each dimension, float32, on the CPU.
        massive: by dimension the share of the mean squared norm that it holds, for the few that hold most.
        left_out: massive tokens that left the means; 0 where the readout does not ask for that.
    """

    norm: float
    deviation: Tensor
    massive: Mapping[int, float]
    left_out: int = 0

    def spread(self, direction: Tensor | None = None) -> float:
        """How far tokens spread, for a step along a direction; see the top of this file.

        Args:
            direction: [d] or [k, d], of any length, k directions counting together; None gives `common`.

        Returns:
            In activation units; nan where no token was counted or all are equal.
        """
        common = float(torch.linalg.vector_norm(self.deviation))
        if not math.isfinite(common) or common == 0.0:
            return math.nan
        if direction is None or not bool(direction.any()):
            return common
        shares = direction.float().square().reshape(-1, len(self.deviation)).sum(0)
        # A dimension that is the same in every token would count without bound.
        deviation = self.deviation.clamp_min(_QUIETEST * common / math.sqrt(len(self.deviation)))
        own = math.sqrt(len(deviation) / float((shares / shares.sum() / deviation.square()).sum()))
        return math.sqrt(common * own)


class Moments(NamedTuple):
    """Mean and spread of some tokens.

    Attributes:
        tokens: how many they are, as a number or a tensor [].
        mean: [d] of them.
        power: [d] sum of their squared distances from it.
    """

    tokens: Tensor | float
    mean: Tensor
    power: Tensor

    def joined(self, other: Moments) -> Moments:
        """Those of both (Chan's update); tokens that are none change nothing.

        Args:
            other: of further tokens.
        """
        total = self.tokens + other.tokens
        share = other.tokens / (total.clamp_min(1.0) if isinstance(total, Tensor) else max(total, 1.0))
        step = other.mean - self.mean
        power = self.power + other.power + step.square() * (self.tokens * share)
        return Moments(total, self.mean + step * share, power)


class PassScale(NamedTuple):
    """What one pass says of one site's scale; it counts once it is added to a `TokenScales`.

    Attributes:
        bins: [b, t] bins of the token norms.
        counted: [b, t] float32, 1 where a token counts.
        mean: [d] mean of the tokens that count.
        power: [d] sum of their squared distances from it.
        left_out: [] massive tokens that left the means, where that was asked for.
    """

    bins: Tensor
    counted: Tensor
    mean: Tensor
    power: Tensor
    left_out: Tensor | None = None

    @classmethod
    def of(cls, h: Tensor, counted: Tensor) -> PassScale:
        """Look at the tokens of a pass.

        Args:
            h: [b, t, d] activations.
            counted: [b, t] float32, 1 where the token counts and 0 where it is a pad or a row's first token.
        """
        with torch.autocast(h.device.type, enabled=False):
            values, found = h.float(), None
            # Times zero keeps what is not finite on pads. Masking costs a copy, looking costs an accelerator a stop.
            if h.device.type == "cpu":
                found = _mean_and_power(values, counted)
            if found is None or not math.isfinite(float(found[1].sum())):
                found = _mean_and_power(torch.where(counted[..., None] > 0, values, 0.0), counted)
            return cls(NormMedian.bins(h), counted, *found)


def _mean_and_power(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """[d] mean and [d] sum of squared distances from it, of tokens [b, t, d] that count by weights [b, t]."""
    mean = torch.bmm(weights[:, None], values).sum(dim=(0, 1)) / weights.sum().clamp_min(1.0)
    distances = mse_loss(values, mean.expand_as(values), reduction="none")  # which writes one tensor and not two
    return mean, torch.bmm(weights[:, None], distances).sum(dim=(0, 1))


class TokenScales:
    """Takes the tokens of one site pass by pass; holds a mean and a variance per dimension, and no token."""

    def __init__(self) -> None:
        self._norms = NormMedian()
        self._moments: Moments | None = None
        self._left_out = 0

    def update(self, h: Tensor, counted: Tensor) -> None:
        """Count the tokens of a pass.

        Args:
            h: [b, t, d] activations.
            counted: [b, t] float32, 1 where the token counts.
        """
        self.add(PassScale.of(h, counted))

    def add(self, one: PassScale) -> None:
        """Count what a pass has said.

        Args:
            one: of this site.
        """
        self._norms.count(one.bins, one.counted)
        self._left_out += 0 if one.left_out is None else int(one.left_out)
        new = Moments(one.counted.sum(), one.mean, one.power)
        self._moments = new if self._moments is None else self._moments.joined(new)

    def result(self) -> TokenScale:
        """The scale of all tokens counted."""
        if self._moments is None or float(self._moments.tokens) == 0:
            return TokenScale(self._norms.result(), torch.full((1,), math.nan, dtype=torch.float32), {})
        count, mean, power = self._moments
        variance = power.cpu() / float(count)
        square = variance + mean.cpu().square()
        shares = square / square.sum()
        told = (square > MASSIVE * square.median()) & (shares >= _SHARE)
        massive = {int(place): round(float(shares[place]), 4) for place in told.nonzero()[:, 0]}
        return TokenScale(self._norms.result(), variance.sqrt(), massive, self._left_out)


def massive_tokens(norms: Tensor, counted: Tensor, read: Tensor) -> Tensor:
    """Which tokens are many times as long as the median of their text; a mean of such alone keeps them.

    Args:
        norms: [b, t] of the tokens.
        counted: [b, t] float32, 1 where a token counts and 0 where it is a pad or a row's first token.
        read: [b, t] bool, which tokens enter the mean.

    Returns:
        [b, t] bool.
    """
    median = norms.masked_fill(counted == 0, torch.nan).nanmedian(dim=1, keepdim=True).values
    found: Tensor = (counted > 0) & norms.isfinite() & (norms > MASSIVE_TOKEN * median)
    return found & (read & ~found).any(dim=1, keepdim=True)


def scale_of(rows: Sequence[Tensor]) -> TokenScale:
    """The scale of texts that have been read, each one's first token left out.

    Args:
        rows: [t, d] of each text.
    """
    scales = TokenScales()
    for tensor in rows:
        counted = torch.ones(1, len(tensor), dtype=torch.float32)
        counted[0, 0] = 0.0
        scales.update(tensor[None], counted)
    return scales.result()
