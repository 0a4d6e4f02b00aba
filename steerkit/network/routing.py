"""The dense form of a router's choice, [n, e] with zeros where an expert is not chosen; read, and written back.

    read:     dense[token, index[token, slot]] = weights[token, slot]
    written:  the same indices with their new weights; an expert that has become nonzero takes the slot of a chosen one
              whose new weight is 0, else of the one with the smallest

So no expert ever stands in two slots of a token. Where more experts have become nonzero than a token has slots, the
largest of them are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense_weights", "slotted"]


def dense_weights(weights: Tensor, index: Tensor, experts: int) -> Tensor:
    """Spread the weights of the chosen experts over all experts.

    Args:
        weights: [n, k] of those that were chosen.
        index: [n, k] which they are.
        experts: e, how many there are.

    Returns:
        [n, e] in the dtype of the weights.

    Example:
        >>> import torch
        >>> dense_weights(torch.tensor([[0.75, 0.25]]), torch.tensor([[2, 0]]), 4)
        tensor([[0.2500, 0.0000, 0.7500, 0.0000]])
    """
    return weights.new_zeros(len(weights), experts).scatter(1, index.long(), weights)


def slotted(dense: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a dense form back into the slots that a router gives; one vectorised write, whatever was changed.

    Args:
        dense: [n, e] the new weights.
        index: [n, k] which experts were chosen before.

    Returns:
        The weights [n, k] and the indices [n, k], in the slots of before.

    Example:
        >>> import torch
        >>> slotted(torch.tensor([[0.6, 0.0, 0.0, 0.4]]), torch.tensor([[2, 0]]))  # expert 2 gave way to 3
        (tensor([[0.4000, 0.6000]]), tensor([[3, 0]]))
    """
    old = index.long()
    kept = dense.gather(1, old)
    chosen = torch.zeros_like(dense, dtype=torch.bool).scatter(1, old, True)
    is_new = (dense != 0) & ~chosen
    # Of the newcomers the largest, as many as there are slots; rows with fewer of them keep their other slots.
    ranked = dense.masked_fill(~is_new, -torch.inf).topk(old.shape[1], dim=1).indices
    slot = kept.abs().argsort(dim=1, stable=True)
    place = torch.arange(old.shape[1], device=dense.device, dtype=torch.long)
    comes = place < is_new.sum(dim=1, keepdim=True)
    experts = torch.where(comes, ranked, old.gather(1, slot))
    new = old.scatter(1, slot, experts)
    return dense.gather(1, new), new.to(index.dtype)
