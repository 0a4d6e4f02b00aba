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

__all__ = ["ACTIVATIONS", "Activation", "fired"]

Activation: TypeAlias = Literal["relu", "jumprelu", "gated", "topk", "batchtopk"]
ACTIVATIONS: Final = ("relu", "jumprelu", "gated", "topk", "batchtopk")


def fired(
    product: Tensor,
    bias: Tensor,
    *,
    threshold: Tensor | None = None,
    gate_bias: Tensor | None = None,
    gate_scale: Tensor | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Latents from what the encoder's rows make of activations.

    Args:
        product: [..., k], before any bias.
        bias: [k].
        threshold: [k], what the pre-activation has to exceed; None asks for more than zero only.
        gate_bias: [k] of gated dictionaries; None of others.
        gate_scale: [k] of gated dictionaries; None of others.
        top_k: how many latents of a token fire, where that decides; all k have to be there then.

    Returns:
        [..., k], zero where a latent does not fire.
    """
    if gate_bias is not None and gate_scale is not None:
        size = (product * gate_scale + bias).relu()
        return torch.where(product + gate_bias > 0, size, torch.zeros_like(size))
    pre = product + bias
    if top_k is None:
        return pre.relu() if threshold is None else torch.where(pre > threshold, pre.relu(), torch.zeros_like(pre))
    values, places = pre.topk(top_k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter_(-1, places, values.relu())
