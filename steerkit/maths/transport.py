"""Affine maps that carry one sample of numbers to another, coordinate by coordinate.

    x' = scale (x - source) + target        source, target: the two means

    mean        scale = 1
    gaussian    scale = sd(t) / sd(s)
    linear      scale = cov(Qs, Qt) / var(Qs),      Qs, Qt: the quantile functions of the two samples

The last one is the affine map nearest to the optimal transport of the one empirical distribution to the other, whose
plan in one dimension is the sorted samples side by side (Rodriguez et al. 2024, arXiv 2410.23054).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steerkit.errors import FitError

__all__ = ["AffineMap", "MapKind", "affine_map", "quantile_covariance"]

MapKind = Literal["linear", "mean", "gaussian"]


class AffineMap(NamedTuple):
    """One affine map per coordinate: `scale (x - source) + target`.

    Attributes:
        scale: [d] float64.
        source: [d] float64, the mean of what is moved.
        target: [d] float64, the mean of what it is moved to.
    """

    scale: Tensor
    source: Tensor
    target: Tensor

    @property
    def shift(self) -> Tensor:
        """[d] what is added where the map is written as `scale x + shift`."""
        return self.target - self.scale * self.source


def affine_map(source: Tensor, target: Tensor, kind: MapKind = "linear", *, std_eps: float = 1e-4) -> AffineMap:
    """The map of each coordinate from one sample to another.

    Args:
        source: [n, d], what is moved.
        target: [m, d]; n and m may differ, and no order of rows matters.
        kind: how the spread is treated: `linear`, `mean` or `gaussian`.
        std_eps: coordinates whose source has a standard deviation (of n - 1) of at most this much are only shifted,
            since a spread of nothing cannot be stretched to another.

    Returns:
        The map, computed in float64.

    Raises:
        FitError: a side is empty, the sides are not as wide, or `kind` is none of these.

    Example:
        >>> import torch
        >>> found = affine_map(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[1.0], [3.0], [5.0], [7.0]]))
        >>> found.scale.item(), found.shift.item()
        (2.0, 1.0)
    """
    if source.dim() != 2 or target.dim() != 2 or source.shape[1] != target.shape[1] or not len(source) * len(target):
        shapes = f"{list(source.shape)} and {list(target.shape)}"
        raise FitError(f"an affine map needs rows of both sides, got {shapes}; give [n, d] and [m, d]")
    if kind not in ("linear", "mean", "gaussian"):
        raise FitError(f"kind {kind!r}; give linear, mean or gaussian")
    source, target = source.double(), target.double()
    means = source.mean(dim=0), target.mean(dim=0)
    scale = torch.ones_like(means[0])
    if kind != "mean" and len(source) > 1:
        spread = source.std(dim=0)
        if kind == "gaussian":
            stretched = (target.std(dim=0) if len(target) > 1 else torch.zeros_like(scale)) / spread
        else:
            stretched = quantile_covariance(source, target) / source.var(dim=0, correction=0)
        scale = torch.where(spread > std_eps, stretched, scale)
    return AffineMap(scale, *means)


def quantile_covariance(source: Tensor, target: Tensor) -> Tensor:
    """Covariance of the quantile functions of two samples, coordinate by coordinate: exact, whatever their sizes.

    Both functions are steps, at i/n and j/m. Between two neighbouring steps of either both are constant, so the
    integral is a sum over those pieces. For n = m it is the mean product of the sorted samples.

    Args:
        source: [n, d].
        target: [m, d].

    Returns:
        [d] float64, of at least 0.
    """
    n, m = len(source), len(target)
    steps = {*range(m, n * m + 1, m), *range(n, n * m + 1, n)}  # in parts of 1 / (n m)
    ends = torch.tensor(sorted(steps), dtype=torch.long)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    weights = ((ends - starts).double() / (n * m)).to(source.device)
    pieces = []
    for rows, size in ((source, m), (target, n)):
        ordered = rows.double().sort(dim=0).values
        centred = ordered - ordered.mean(dim=0)
        pieces.append(centred[torch.div(starts, size, rounding_mode="floor").to(rows.device)])
    return torch.einsum("k,kd,kd->d", weights, *pieces)
