"""Running statistics: what a method needs of the activations without keeping them."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from steerkit.errors import FitError

__all__ = ["Accumulator", "Means", "NormMedian", "PairSigns", "SignCounts", "token_norms"]


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


class SignCounts(NamedTuple):
    """How the pairs differ at each dimension, [d] each.

    Attributes:
        up: pairs whose positive side is the larger one.
        down: pairs whose negative side is.
        pairs: all pairs that count.
        effect: size of the mean difference over the root of the mean squared one, from 0 to 1: it grows with the
            standardised mean difference, and is 1 where all pairs differ by the same.
    """

    up: Tensor
    down: Tensor
    pairs: Tensor
    effect: Tensor


class PairSigns:
    """Counts the pairs by the sign of their difference at each dimension, without ever holding the samples.

    Args:
        dtype: in which the sides are compared.
        rounding: a difference of at most this share of the larger side counts as none.
        skip_zeros: leave out pairs of which a side is zero all over, as where routed experts took no token.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, *, rounding: float = 0.0, skip_zeros: bool = False) -> None:
        self._dtype, self._rounding, self._skip_zeros = dtype, rounding, skip_zeros
        self._sums: Tensor | None = None

    def update(self, positive: Tensor, negative: Tensor) -> None:
        """Count the pairs of a batch.

        Args:
            positive: [k, d] float32, k may be 0.
            negative: [k, d] float32, row i the other side of pair i.

        Raises:
            FitError: the sides have not as many rows.
        """
        if positive.shape != negative.shape:
            raise FitError(f"{len(positive)} positive and {len(negative)} negative rows are no pairs")
        if not len(positive):
            return
        apart = positive.to(self._dtype) - negative.to(self._dtype)
        if self._rounding:
            apart = apart.where(apart.abs() > self._rounding * torch.maximum(positive.abs(), negative.abs()), 0.0)
        counted = torch.ones_like(positive, dtype=torch.bool)
        if self._skip_zeros:
            counted &= ((positive != 0).any(1) & (negative != 0).any(1))[:, None]
        difference = (positive - negative).where(counted, 0.0)  # not finite where a row is not
        counts = ((apart > 0) & counted, (apart < 0) & counted, counted)
        rows = (*(count.float() for count in counts), difference, difference.square())
        sums = torch.stack([row.sum(dim=0) for row in rows])  # float32 counts exactly up to 16 million pairs
        self._sums = sums if self._sums is None else self._sums + sums

    def result(self) -> tuple[Tensor, Tensor]:
        """The counts as `read` takes them, [3, d] each, on the CPU; not finite where an activation was not.

        Raises:
            FitError: there was no pair.
        """
        if self._sums is None:
            raise FitError("there is no pair to compare")
        up, down, pairs, total, power = self._sums.cpu()
        return torch.stack([up, total, pairs]), torch.stack([down, power, pairs])

    @staticmethod
    def read(positive: Tensor, negative: Tensor) -> SignCounts:
        """The counts from what `result` gave.

        Args:
            positive: [3, d].
            negative: [3, d].

        Raises:
            FitError: something else, such as activations that were not streamed.
        """
        is_ours = positive.shape == negative.shape and len(positive) == 3 and torch.equal(positive[2], negative[2])
        if not is_ours or bool((positive[0] + negative[0] > positive[2]).any()):
            raise FitError("got activations and no counts of pairs; read them with steerkit.fitting.read")
        (up, total, pairs), (down, power, _) = positive, negative
        pairs = pairs.clamp_min(1.0)
        root = (pairs.double() * power.double()).sqrt()
        effect = torch.where(root > 0, total.double().abs() / root, 0.0).float()
        return SignCounts(up, down, pairs, effect)


def token_norms(h: Tensor) -> Tensor:
    """How long activations are; halves are squared and summed in float32, doubles as they are.

    Args:
        h: [..., d] of any float dtype.

    Returns:
        [...] float32.
    """
    norms: Tensor = torch.linalg.vector_norm(h, dim=-1, dtype=torch.promote_types(h.dtype, torch.float32))
    return norms.float()


class NormMedian:
    """The median token norm, from a histogram with bins 0.4 % wide, so that memory does not grow with the tokens.

    The median and not the mean: a few tokens of some models carry norms a thousand times the usual (arXiv 2402.17762).
    """

    _LOW, _HIGH, _BINS = -8.0, 8.0, 8192

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    @classmethod
    def bins(cls, h: Tensor) -> Tensor:
        """Where the norms of a pass belong.

        Args:
            h: [b, t, d] activations.

        Returns:
            [b, t] int64 bins.
        """
        return cls.bins_of(token_norms(h))

    @classmethod
    def bins_of(cls, norms: Tensor) -> Tensor:
        """Where norms belong.

        Args:
            norms: [...] float32.

        Returns:
            [...] int64 bins.
        """
        place = (norms.clamp_min(10.0**cls._LOW).log10() - cls._LOW) / (cls._HIGH - cls._LOW)
        bins: Tensor = (place.nan_to_num(1.0) * cls._BINS).long().clamp(0, cls._BINS - 1)
        return bins

    def update(self, h: Tensor, counted: Tensor) -> None:
        """Count the norms of a pass.

        Args:
            h: [b, t, d] activations.
            counted: [b, t] float32, 1 where the token counts and 0 where it is a pad or a row's first token.
        """
        self.count(self.bins(h), counted)

    def count(self, bins: Tensor, counted: Tensor) -> None:
        """Count norms that have been put into bins.

        Args:
            bins: [b, t] what `bins` gave.
            counted: [b, t] float32, 1 where the token counts and 0 where it is a pad or a row's first token.
        """
        if self._counts is None:
            self._counts = torch.zeros(self._BINS, device=bins.device, dtype=torch.float32)
        self._counts.scatter_add_(0, bins.flatten(), counted.flatten().to(self._counts.device))

    def result(self) -> float:
        """The median norm (to 0.4 %); nan where no token was counted."""
        if self._counts is None or float(self._counts.sum()) == 0:
            return math.nan
        below = self._counts.cumsum(0)
        index = int(torch.searchsorted(below, below[-1] / 2))
        return float(10 ** (self._LOW + (index + 0.5) / self._BINS * (self._HIGH - self._LOW)))
