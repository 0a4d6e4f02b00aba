"""Pure functions that change activations, shared by the methods.

Shapes: `b` rows, `t` tokens of this pass, `d` width of the site. Nothing is changed in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add", "add_window", "keep_norm"]


def add(h: Tensor, direction: Tensor) -> Tensor:
    """Add one direction to every token.

    Args:
        h: [b, t, d] activations.
        direction: [d], or [b, 1, d] where every row has its own, in the dtype of `h`.

    Returns:
        [b, t, d]
    """
    return h + direction


def add_window(h: Tensor, directions: Tensor, offset: Tensor) -> Tensor:
    """Add one direction per position inside a window, nothing outside of it.

    Args:
        h: [b, t, d] activations.
        directions: [w, d], or [b, w, d] where every row has its own, in the dtype of `h`.
        offset: [b, t] place of every token counted from the window's start; outside 0..w-1 nothing is added.

    Returns:
        [b, t, d]
    """
    width = directions.shape[-2]
    inside = (offset >= 0) & (offset < width)
    row = offset.clamp(0, width - 1)
    if directions.dim() == 2:
        added = directions[row]
    else:
        added = directions.gather(1, row[..., None].expand(-1, -1, directions.shape[-1]))
    return torch.where(inside[..., None], h + added, h)


def keep_norm(edited: Tensor, h: Tensor) -> Tensor:
    """Give every edited token the norm it had before.

    Args:
        edited: [b, t, d] activations after an edit.
        h: [b, t, d] activations before it.

    Returns:
        [b, t, d] in float32, per token `edited * |h| / |edited|`; a token that the edit made zero stays zero.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    edited, before = edited.to(wide), torch.linalg.vector_norm(h.to(wide), dim=-1, keepdim=True)
    after = torch.linalg.vector_norm(edited, dim=-1, keepdim=True)
    return edited * torch.where(after > 0, before / after.clamp_min(torch.finfo(torch.float32).tiny), after)
