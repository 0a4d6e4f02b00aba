"""From pre-activations to latents: which of them fire, and how strongly.

    relu:       f = max(a, 0)
    jumprelu:   f = max(a, 0)  where a > threshold, strictly, else 0
    gated:      f = max(r b + m, 0)  where b + g > 0, else 0, with b = W x before any bias
    topk:       f = max(a, 0)  where a is among the K largest of its token, else 0
    batchtopk:  as jumprelu, with the threshold that training estimated; without one, as topk

Rajamanoharan et al. (2024), arXiv 2407.14435 (JumpReLU) and 2404.16014 (gated); Gao et al. (2024), arXiv 2406.04093
(TopK); Bussmann et al. (2024), arXiv 2412.06410 (BatchTopK). In training BatchTopK keeps the largest of a whole batch,
so that one text decides about another; here no row ever depends on another.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "above", "largest"]

Activation: TypeAlias = Literal["relu", "jumprelu", "gated", "topk", "batchtopk"]
ACTIVATIONS: Final = ("relu", "jumprelu", "gated", "topk", "batchtopk")


def above(pre: Tensor, threshold: Tensor) -> Tensor:
    """What lies strictly above its threshold and above zero, the rest being zero.

    Args:
        pre: [..., k] pre-activations.
        threshold: [k], or one number [].

    Returns:
        [..., k]
    """
    return torch.where(pre > threshold, pre.relu(), torch.zeros_like(pre))


def largest(pre: Tensor, count: int) -> Tensor:
    """The `count` largest of each token, those below zero and the rest being zero.

    Args:
        pre: [..., k] pre-activations.
        count: how many, at most k.

    Returns:
        [..., k]
    """
    values, places = pre.topk(count, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter_(-1, places, values.relu())
