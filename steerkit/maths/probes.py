"""Tell two sides apart: the area under the curve of scores, a logistic probe, and how many heads stand side by side."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerkit.errors import FitError
from steerkit.maths.directions import coordinates

__all__ = ["LinearProbe", "auc", "aucs", "fpr_at_tpr", "head_count", "linear_probe"]

_STEPS = 100  # Newton's method needs a handful; this only ends what does not settle


class LinearProbe(NamedTuple):
    """A hyperplane between two sides.

    Attributes:
        weight: [d] float32, its normal; it points to the positive side.
        bias: the score where an activation is zero.
    """

    weight: Tensor
    bias: float

    def scores(self, h: Tensor) -> Tensor:
        """The log-odds of the positive side.

        Args:
            h: [..., d] activations.

        Returns:
            [...] float32.
        """
        return coordinates(h.float(), self.weight.to(h.device)) + self.bias


def auc(positive: Tensor, negative: Tensor, *, dtype: torch.dtype = torch.float64) -> float:
    """Area under the ROC curve: the share of couples in which the positive score is larger, ties counted half.

    Args:
        positive: [n] scores.
        negative: [m] scores.
        dtype: what the share is rounded to.

    Returns:
        0.5 where the scores tell nothing, 1 where every positive score is larger, 0 where every one is smaller; nan
        where a side is empty.

    Example:
        >>> import torch
        >>> auc(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.0]))
        0.875
    """
    couples = len(positive) * len(negative)
    if not couples:
        return math.nan
    # What is no number is neither larger nor the same.
    plus, minus = positive[~positive.isnan()].contiguous(), negative[~negative.isnan()].sort().values
    smaller, not_larger = (torch.searchsorted(minus, plus, right=ties).sum() for ties in (False, True))
    return float((0.5 * (smaller + not_larger).double()).to(dtype) / couples)


def aucs(positive: Tensor, negative: Tensor) -> Tensor:
    """Area under the ROC curve of each coordinate on its own: the share of couples in the right order, ties half.

    Args:
        positive: [n, d], no nan.
        negative: [m, d].

    Returns:
        [d] float64, see `auc`.

    Raises:
        FitError: a side is empty, or the sides are not as wide.

    Example:
        >>> import torch
        >>> aucs(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])).tolist()
        [0.875, 0.5]
    """
    if positive.dim() != 2 or negative.dim() != 2 or positive.shape[1] != negative.shape[1]:
        raise FitError(f"aucs: got {list(positive.shape)} and {list(negative.shape)}; give [n, d] and [m, d]")
    couples = len(positive) * len(negative)
    if not couples:
        raise FitError(f"aucs: got {len(positive)} and {len(negative)} rows; give some of each side")
    plus, minus = positive.T.contiguous(), negative.T.sort(dim=1).values.contiguous()
    smaller, not_larger = (torch.searchsorted(minus, plus, right=ties).sum(dim=1) for ties in (False, True))
    return 0.5 * (smaller + not_larger).double() / couples


def fpr_at_tpr(positive: Tensor, negative: Tensor, share: float) -> float:
    """Share of the negative scores at or over the threshold that a share of the positive ones reaches.

    Args:
        positive: [n] scores.
        negative: [m] scores.
        share: such as 0.95.
    """
    needed = max(1, math.ceil(share * len(positive)))
    threshold = positive.sort(descending=True).values[needed - 1]
    return float((negative >= threshold).double().mean())


def linear_probe(positive: Tensor, negative: Tensor, *, penalty: float = 1.0) -> LinearProbe:
    """Fit a logistic regression between two sides of activations (Newton's method, in float64).

    Features are standardised for the fit, so that the penalty does not depend on how large activations are. The same
    data gives the same probe; nothing is drawn.

    Args:
        positive: [n, d] activations.
        negative: [m, d] activations.
        penalty: of the squared length of the weights of standardised features, over 0.

    Returns:
        The probe, for activations as they are.

    Raises:
        FitError: a side is empty, an activation is not finite, nothing varies, or the penalty is not over 0.

    Example:
        >>> import torch
        >>> probe = linear_probe(torch.tensor([[2.0], [3.0]]), torch.tensor([[0.0], [1.0]]))
        >>> [score > 0 for score in probe.scores(torch.tensor([[3.0], [0.0]])).tolist()]
        [True, False]
    """
    if not len(positive) or not len(negative):
        raise FitError(f"a probe needs both sides, got {len(positive)} and {len(negative)} rows; give some of each")
    if not penalty > 0:
        raise FitError(f"penalty {penalty!r}: give a number over 0")
    rows = torch.cat([positive, negative]).double().cpu()
    labels = torch.cat([torch.ones(len(positive), dtype=torch.double), torch.zeros(len(negative), dtype=torch.double)])
    if not bool(torch.isfinite(rows).all()):
        raise FitError("activations are not finite; load the model in float32 or bfloat16")
    mean, spread = rows.mean(dim=0), rows.std(dim=0, correction=0)
    if not bool((spread > 0).any()):
        raise FitError("no activation varies, so nothing tells the two sides apart")
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    features, basis = (rows - mean) / spread, None
    if features.shape[1] > len(features):  # the weights lie in the span of the rows
        basis, triangle = torch.linalg.qr(features.T)
        features = triangle.T
    found = _newton(torch.cat([features, torch.ones(len(features), 1, dtype=torch.double)], dim=1), labels, penalty)
    weight = found[:-1] if basis is None else basis @ found[:-1]
    weight = weight / spread
    return LinearProbe(weight.float(), float(found[-1] - weight @ mean))


def _newton(features: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """[d + 1] weights and bias (the last column of the features [n, d + 1] is 1) of the least penalised loss."""
    held = torch.full((features.shape[1],), penalty, dtype=torch.double)
    held[-1] = 1e-6  # the bias is free; this keeps the system solvable

    def loss(weights: Tensor) -> float:
        fit = torch.nn.functional.binary_cross_entropy_with_logits(features @ weights, labels, reduction="sum")
        return float(fit + 0.5 * (held * weights**2).sum())

    weights = torch.zeros_like(held)
    for _ in range(_STEPS):
        chances = torch.sigmoid(features @ weights)
        gradient = features.T @ (chances - labels) + held * weights
        curvature = features.T @ ((chances * (1 - chances))[:, None] * features) + torch.diag(held)
        step = torch.linalg.solve(curvature, gradient)
        size, before = 1.0, loss(weights)
        while loss(weights - size * step) > before and size > 1e-6:
            size /= 2
        weights = weights - size * step
        if float(step.norm()) <= 1e-9 * (1.0 + float(weights.norm())):
            break
    return weights


def head_count(model: Any, name: str = "num_attention_heads") -> int:
    """How many heads stand side by side at the site `z`, as the model's config says.

    Args:
        model: a transformers model, or its config.
        name: the config's entry; linear attention has `linear_num_value_heads`.

    Returns:
        The number of query heads; 0 where the config does not say.
    """
    config = getattr(model, "config", model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, name, None)
    return found if isinstance(found, int) and found > 0 else 0
