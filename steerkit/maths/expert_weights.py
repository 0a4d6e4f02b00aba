"""What is done to the weights of routed experts, in the dense form [..., e] with zeros where an expert is not chosen.

A router's weights have a sum that is the family's own: 1 where they are normalised, anything where they are not. What
is taken from one expert goes to the others of its token, so that the sum stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["between", "largest", "with_forced", "with_sum"]


def with_sum(weights: Tensor, total: Tensor) -> Tensor:
    """Scale the weights of each token to a sum; where all are zero they stay so, and a sum that is right is kept.

    Args:
        weights: [..., e] not negative.
        total: [..., 1] the sum.

    Example:
        >>> import torch
        >>> with_sum(torch.tensor([0.0, 0.25, 0.25]), torch.tensor([1.0]))
        tensor([0.0000, 0.5000, 0.5000])
    """
    found = weights.sum(dim=-1, keepdim=True)
    is_some = found > 0
    return weights * torch.where(is_some, total / found.where(is_some, 1.0), 1.0)


def largest(weights: Tensor, slots: Tensor) -> Tensor:
    """Which experts are among the largest of their token; of equal ones the first.

    Args:
        weights: [..., e].
        slots: [] how many, as a tensor so that nothing waits for an accelerator.

    Returns:
        [..., e] bool.
    """
    order = weights.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1) < slots


def with_forced(weights: Tensor, forced: Tensor, mean: Tensor, slots: Tensor) -> Tensor:
    """Give each token the forced experts, in the slots of the smallest others.

    Args:
        weights: [..., e], at most so many nonzero as there are slots.
        forced: [e] bool, at most so many as there are slots.
        mean: [..., 1] the weight of one that was not chosen.
        slots: [] how many experts a token gets.

    Returns:
        [..., e]; tokens that have them all come back as they were.
    """
    kept = largest(weights.masked_fill(forced, torch.inf), slots)
    return torch.where(forced & (weights == 0), mean, weights) * kept


def between(weights: Tensor, target: Tensor, strength: Tensor, slots: Tensor, *, may_come: bool) -> Tensor:
    """The weights on the way to others: `(1 - strength) weights + strength target`, and never below zero.

    An expert that comes in takes its slot from the smallest one at any strength above 0; the others then have the sum
    that the two together would have.

    Args:
        weights: [..., e].
        target: [..., e].
        strength: [] or [..., 1, 1], at most 1; below 0 leads away from the target.
        slots: [] how many experts a token gets.
        may_come: whether the target may hold experts that the weights do not.
    """
    found = torch.lerp(weights, target, strength).clamp_min(0.0)
    if not may_come:
        return found
    comes = (weights == 0) & (target > 0) & (strength > 0)
    kept = found * largest(found.masked_fill(comes, torch.inf), slots)
    whole = with_sum(kept, found.sum(dim=-1, keepdim=True))
    return torch.where(comes.any(dim=-1, keepdim=True), whole, found)
