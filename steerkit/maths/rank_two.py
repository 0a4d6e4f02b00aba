"""Edits that move a token inside the plane of two directions, as numbers: what engines with one graph for all compute.

Additions, projections and rotations differ in a few coefficients only. With `c1 = h.b1`, `c2 = h.b2`, the length
`r = sqrt(c1^2 + c2^2)` and the strength s:

    h' = h + k1 b1 + k2 b2,        k = W (1, s, cos s - 1, sin s) (1, c1, c2, r),        where c1 > threshold

so that tokens with different edits can share one computation that gathers `b1`, `b2` and W for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from steerkit.errors import FitError

__all__ = ["READS", "TURNS", "RankTwo", "displacement", "features", "leads", "offsets", "rank_two"]

READS = ("one", "along", "across", "length")
"""What an amount may be proportional to of the token: 1, c1, c2, r."""
TURNS = ("one", "strength", "less", "sine")
"""And of the strength: 1, s, cos s - 1, sin s, with s in degrees."""

Amounts = Mapping[tuple[str, str], float]


class RankTwo(NamedTuple):
    """The numbers of one edit.

    Attributes:
        basis: [2, d] float32, b1 and b2; a second one of zeros where the edit has one direction.
        weights: [2, 4, 4] float32, for b1 and b2 what W holds by `READS` and `TURNS`.
        threshold: tokens whose c1 is not above it stay; minus infinity for none.
    """

    basis: Tensor
    weights: Tensor
    threshold: float = -math.inf


def rank_two(
    first: Tensor,
    moves: Amounts,
    second: Tensor | None = None,
    turns: Amounts | None = None,
    threshold: float = -math.inf,
) -> RankTwo:
    """The numbers of an edit from its formula.

    Args:
        first: [d] b1.
        moves: how far a token moves along b1, by names of `READS` and `TURNS`: ``{("along", "strength"): -1.0}`` is
            `-s c1`.
        second: [d] b2; None for an edit along one direction.
        turns: the same for b2.
        threshold: see `RankTwo`.

    Example:
        >>> import torch
        >>> edit = rank_two(torch.tensor([1.0, 0.0]), {("along", "strength"): -1.0})
        >>> lead = leads(edit.weights, features(torch.tensor(1.0)))
        >>> h = torch.tensor([[3.0, 4.0]])
        >>> h + displacement(h, *edit.basis, offsets(edit), lead, torch.tensor(edit.threshold))[0]
        tensor([[0., 4.]])
    """
    weights = torch.zeros(2, len(READS), len(TURNS), dtype=torch.float32)
    for row, amounts in enumerate((moves, turns or {})):
        for (read, turn), amount in amounts.items():
            weights[row, READS.index(read), TURNS.index(turn)] = amount
    other = torch.zeros_like(first) if second is None else second
    return RankTwo(torch.stack([first, other]).to(torch.float32), weights, threshold)


def features(strength: Tensor) -> Tensor:
    """What the weights of an edit are multiplied with, of a strength.

    Args:
        strength: [...], any float dtype.

    Returns:
        [..., 4] float32, by `TURNS`.
    """
    exact = strength.double()
    angle = torch.fmod(exact, 360.0)
    half, full = torch.deg2rad(angle / 2), torch.deg2rad(angle)
    less = -2 * torch.sin(half) ** 2  # cos - 1, without cancellation at small angles
    return torch.stack([torch.ones_like(exact), exact, less, torch.sin(full)], dim=-1).float()


def offsets(edit: RankTwo) -> Tensor:
    """What of an edit reads nothing of the token, so that it may differ from site to site.

    Args:
        edit: the edit at one site.

    Returns:
        [4] float32: how far along b1 whatever the strength, and by strength; the same for b2.

    Raises:
        FitError: it goes with an angle, which no method's does.
    """
    if bool(edit.weights[:, 0, 2:].any()):
        raise FitError("an edit that adds by an angle, without reading the token, has no such numbers")
    return edit.weights[:, 0, :2].flatten()


def leads(weights: Tensor, turns: Tensor) -> Tensor:
    """What of an edit is the same at all sites: the strength, and the factors of what is read of a token.

    Args:
        weights: [..., 2, 4, 4] of the edit at any site.
        turns: [..., 4] what `features` gave.

    Returns:
        [..., 7] float32: the strength; for b1 the factors of c1, c2 and r; for b2 the same.
    """
    factors = (weights[..., 1:, :] * turns[..., None, None, :]).sum(dim=-1)
    return torch.cat([turns[..., 1:2], factors.flatten(start_dim=-2)], dim=-1)


def displacement(
    wide: Tensor, first: Tensor, second: Tensor, offset: Tensor, lead: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """How far tokens are moved, each by an edit of its own.

    Args:
        wide: [..., d] activations, float32.
        first: [..., d] b1 of each token, or [d].
        second: [..., d] b2.
        offset: [..., 4] what `offsets` gave.
        lead: [..., 7] what `leads` gave.
        threshold: [...].

    Returns:
        [..., d] what is to be added, and [...] bool, which tokens are moved at all.
    """
    c1, c2 = (wide * first).sum(dim=-1), (wide * second).sum(dim=-1)
    r = torch.sqrt(c1 * c1 + c2 * c2)
    strength, *by = lead.unbind(dim=-1)
    start1, slope1, start2, slope2 = offset.unbind(dim=-1)
    # One expression for each direction, which a compiler appends to the sums above.
    along = start1 + slope1 * strength + by[0] * c1 + by[1] * c2 + by[2] * r
    across = start2 + slope2 * strength + by[3] * c1 + by[4] * c2 + by[5] * r
    return along[..., None] * first + across[..., None] * second, c1 > threshold
