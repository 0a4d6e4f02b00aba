"""Which latents tell two sides apart: how often each fires and how strongly, and what chance would do with so many.

    share gap   a_k = share of positive texts in which latent k fires  -  the same of negative ones
    mean gap    m_k = mean of f_k over positive texts  -  over negative ones

Thousands of latents are compared at once, so that some differ by luck alone. Each gets the p of Fisher's exact test of
firing against side, two-sided, and q, what p is among so many: Benjamini and Hochberg's (the share of false ones among
those up to here) or Holm's (the chance that any of them is false). Latents that fire on all texts or on none are no
hypotheses: they are not counted among the many.

SAIF (He et al. 2025, arXiv 2502.11356) takes the latents that fire with an instruction and not without it, over pairs
of texts that differ in nothing else, and adds to each the mean plus `beta` standard deviations of its activation over
the texts with it. Both formulas are second-hand: no code and no full text was at hand. Unknown are the range of `beta`,
whether the standard deviation is over firing texts only (here: over all of them), and its number of freedom (here: n).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from steerkit.errors import DataError

__all__ = ["Correction", "Gaps", "activation_gap", "corrected", "saif_amounts", "saif_sensitivity"]

Correction = Literal["benjamini-hochberg", "holm"]


@dataclass(frozen=True, eq=False)
class Gaps:
    """What parts two sides, latent by latent.

    Attributes:
        share_gap: [k] float64.
        mean_gap: [k] float64.
        positive_share: [k], of positive texts in which it fires.
        negative_share: [k].
        p: [k], of Fisher's exact test; 1 where the latent fires on all texts or on none.
        q: [k], corrected for the number of latents that can differ.
        tested: how many those are.
    """

    share_gap: Tensor
    mean_gap: Tensor
    positive_share: Tensor
    negative_share: Tensor
    p: Tensor
    q: Tensor
    tested: int

    def order(self) -> list[int]:
        """The latents from the most to the least positive: by share gap, then mean gap, then number."""
        keys = np.lexsort((-self.mean_gap.numpy(), -self.share_gap.numpy()))
        return [int(one) for one in keys]


def activation_gap(positive: Tensor, negative: Tensor, *, correction: Correction = "benjamini-hochberg") -> Gaps:
    """Compare the latents of two sides.

    Args:
        positive: [n, k] latents, one row for each text.
        negative: [m, k].
        correction: for the number of latents.

    Raises:
        DataError: a side is empty.
    """
    if not len(positive) or not len(negative):
        raise DataError("latents: a side has no text; give at least one on each")
    on, off = ((side > 0).sum(dim=0).cpu() for side in (positive, negative))
    p, is_tested = _fisher(on, off, len(positive), len(negative))
    # Of whole numbers, so that equal gaps are equal to the bit and their order is not left to rounding.
    apart = (on * len(negative) - off * len(positive)).double() / (len(positive) * len(negative))
    return Gaps(
        share_gap=apart,
        mean_gap=positive.double().mean(dim=0).cpu() - negative.double().mean(dim=0).cpu(),
        positive_share=on.double() / len(positive),
        negative_share=off.double() / len(negative),
        p=p,
        q=corrected(p, is_tested, correction),
        tested=int(is_tested.sum()),
    )


def _fisher(on: Tensor, off: Tensor, positives: int, negatives: int) -> tuple[Tensor, Tensor]:
    """Two-sided p [k] of how many texts [k] of each side fire, and which can differ; equal counts are tested once."""
    from scipy.stats import fisher_exact

    pairs = torch.stack([on, off], dim=-1)
    kinds, which = torch.unique(pairs, dim=0, return_inverse=True)
    values = [
        float(fisher_exact([[one, positives - one], [other, negatives - other]]).pvalue)
        for one, other in kinds.tolist()
    ]
    totals = pairs.sum(dim=-1)
    is_tested = (totals > 0) & (totals < positives + negatives)
    return torch.tensor(values, dtype=torch.float64)[which], is_tested


def corrected(p: Tensor, is_tested: Tensor, correction: Correction) -> Tensor:
    """What p values are among many.

    Args:
        p: [k].
        is_tested: [k] bool, which of them are hypotheses; the others get 1.
        correction: by the share of false ones, or by the chance of any.

    Returns:
        [k] float64, 1 at the most.
    """
    found = torch.ones_like(p, dtype=torch.float64)
    values = p[is_tested].double()
    count = len(values)
    if not count:
        return found
    if correction == "benjamini-hochberg":
        from scipy.stats import false_discovery_control

        found[is_tested] = torch.from_numpy(false_discovery_control(values.numpy(), method="bh"))
        return found
    ranked, places = values.sort()
    steps = ranked * torch.arange(count, 0, -1, dtype=torch.float64)
    adjusted = torch.empty_like(values)
    adjusted[places] = torch.cummax(steps, dim=0).values.clamp(max=1.0)
    found[is_tested] = adjusted
    return found


def saif_sensitivity(with_it: Tensor, without: Tensor) -> Tensor:
    """Share of pairs in which a latent fires with the instruction and not without it.

    Args:
        with_it: [n, k] latents of the texts with the instruction.
        without: [n, k] of the same texts without it.

    Returns:
        [k] float64.

    Raises:
        DataError: there are not as many of one as of the other.
    """
    if len(with_it) != len(without) or not len(with_it):
        raise DataError(f"SAIF: {len(with_it)} texts with the instruction, {len(without)} without; give pairs")
    return ((with_it > 0) & (without <= 0)).double().mean(dim=0)


def saif_amounts(with_it: Tensor, latents: list[int], beta: float) -> list[float]:
    """What SAIF adds to each latent, in the latents' own unit: mean + `beta` standard deviations.

    Args:
        with_it: [n, k] latents of the texts with the instruction.
        latents: which.
        beta: how many standard deviations more; negative ones are less.

    Raises:
        DataError: `beta` is not finite.
    """
    if not math.isfinite(beta):
        raise DataError(f"beta is {beta}; give a finite number of standard deviations")
    own = with_it[:, latents].double()
    return [float(one) for one in own.mean(dim=0) + beta * own.std(dim=0, correction=0)]
