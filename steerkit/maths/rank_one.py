"""Rank-1 edits of weight matrices: how much each component writes along a direction, and how much it is changed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from steerkit._support.precision import full_precision
from steerkit.errors import FitError

__all__ = ["Components", "add_in_order", "check_penalty", "elastic_net", "rank_one_edit", "score_components"]

_FLOOR = 1e-8  # norms under it count as it in a cosine, as in the released code


class Components(NamedTuple):
    """The components of one matrix, a of them, w columns each.

    Attributes:
        score: [a] how much each writes along the direction, -1 to 1.
        magnitude: [a] how much each is changed; its sign is the score's, 0 where it is not edited.
        inputs: [a, w] unit vectors k_j; zero where the component writes nothing along the direction.
    """

    score: Tensor
    magnitude: Tensor
    inputs: Tensor

    @property
    def gate(self) -> Tensor:
        """[i] magnitude times unit vector of every component, side by side."""
        return (self.magnitude[:, None] * self.inputs).flatten()


def elastic_net(g: Tensor, rho: float, alpha: float) -> Tensor:
    """Magnitudes that maximise `sum g a - rho (alpha |a|_1 + (1 - alpha) / 2 |a|^2)`, one by one.

    Args:
        g: scores, of any shape; computed in their own precision.
        rho: the penalty; 0 and below leave everything as it is.
        alpha: share of the penalty on |a|, 0 (every component is changed) to just under 1 (few are).

    Returns:
        `sign(g) max(|g| - rho alpha, 0) / (rho (1 - alpha))`, in the shape and dtype of `g`.

    Raises:
        FitError: alpha outside of [0, 1), rho not finite, or a score that is not.

    Example:
        >>> import torch
        >>> elastic_net(torch.tensor([0.5, -0.5, 0.1]), rho=0.5, alpha=0.5)
        tensor([ 1., -1.,  0.])
    """
    check_penalty("rho", rho, alpha)
    if not bool(torch.isfinite(g).all()):
        raise FitError("steer2edit: a score is not finite; load the model in float32 or bfloat16")
    if rho <= 0:
        return torch.zeros_like(g)
    return g.sign() * (g.abs() - rho * alpha).clamp_min(0) / (rho * (1 - alpha))


def rank_one_edit(
    weight: Tensor,
    direction: Tensor,
    mean_input: Tensor,
    *,
    rho: float,
    alpha: float,
    head_width: int | None = None,
    no_reversal: bool = False,
) -> Tensor:
    """The gate of one matrix: its edited weight is `weight + outer(unit(direction), gate)`.

    Args:
        weight: [o, i], as in `y = weight @ x`.
        direction: [o], of any length; zeros edit nothing.
        mean_input: [i], what the matrix reads on average.
        rho: the penalty; 0 and below edit nothing.
        alpha: share of the penalty on the absolute value, from 0 to just under 1.
        head_width: columns that belong to one head; None edits single columns, an MLP's neurons.
        no_reversal: never suppress a component by more than it writes along the direction.

    Returns:
        [i], float32 (float64 where all three are).

    Raises:
        FitError: shapes that do not fit, values that are not finite, or alpha outside of [0, 1).
    """
    for name, tensor in (("weight", weight), ("direction", direction), ("mean_input", mean_input)):
        if not bool(torch.isfinite(tensor).all()):
            raise FitError(f"steer2edit: {name} is not finite; load the model in float32 or bfloat16")
    wide = torch.float64 if {weight.dtype, direction.dtype, mean_input.dtype} == {torch.float64} else torch.float32
    return score_components(
        weight.to(wide),
        direction.to(wide),
        mean_input.to(wide),
        rho=rho,
        alpha=alpha,
        head_width=head_width,
        no_reversal=no_reversal,
    ).gate


@full_precision()
def score_components(
    weight: Tensor,
    direction: Tensor,
    mean_input: Tensor,
    *,
    rho: float,
    alpha: float,
    head_width: int | None = None,
    no_reversal: bool = False,
) -> Components:
    """Scores, magnitudes and input directions of the components of one matrix, in the precision of what is given.

    Args:
        weight: [o, i].
        direction: [o], in the dtype of `weight`.
        mean_input: [i], in the dtype of `weight`.
        rho: as for `elastic_net`.
        alpha: as for `elastic_net`.
        head_width: columns of one component; None takes 1.
        no_reversal: as for `rank_one_edit`.

    Raises:
        FitError: shapes that do not fit, a score that is not finite, or alpha outside of [0, 1).
    """
    width = 1 if head_width is None else head_width
    shapes = f"weight {list(weight.shape)}, direction {list(direction.shape)}, mean_input {list(mean_input.shape)}"
    if weight.dim() != 2 or [*direction.shape, *mean_input.shape] != list(weight.shape):
        raise FitError(f"steer2edit: got {shapes}; a weight [o, i] takes a direction [o] and a mean_input [i]")
    if width < 1 or weight.shape[1] % width:
        raise FitError(f"steer2edit: head_width {width} does not divide the {weight.shape[1]} columns of the weight")
    along = direction / (torch.linalg.vector_norm(direction) + 1e-12)  # a zero direction stays zero
    columns, means = weight.reshape(len(weight), -1, width), mean_input.reshape(-1, width)
    written = torch.bmm(columns.transpose(0, 1), means[..., None])[..., 0]  # [a, o]
    score = cosine_similarity(written, along[None], dim=1, eps=_FLOOR)
    reads = (weight.T @ along).reshape(-1, width)
    size = torch.linalg.vector_norm(reads, dim=1)
    magnitude = elastic_net(score, rho, alpha) * (size > 0)
    if no_reversal:
        magnitude = torch.maximum(magnitude, -size)
    return Components(score, magnitude, reads / size.where(size > 0, torch.ones_like(size))[:, None])


def add_in_order(weight: Tensor, direction: Tensor, inputs: Tensor, magnitude: Tensor) -> Tensor:
    """Add a rank-1 edit in the order of the released code: outer product, times magnitude, sum; each is rounded.

    Args:
        weight: [o, i], in the precision in which all is computed.
        direction: [o], of length 1.
        inputs: [a, w], of length 1.
        magnitude: [a]; components at 0 keep every bit.

    Returns:
        [o, i] in the dtype of `weight`.
    """
    outer = direction.to(weight)[:, None] * inputs.to(weight).flatten()
    factor = magnitude.to(weight).repeat_interleave(inputs.shape[1])
    return torch.where(factor != 0, weight + outer * factor, weight)


def check_penalty(name: str, rho: float, alpha: float) -> None:
    """Refuse a penalty that is none.

    Raises:
        FitError: rho is not finite, or alpha is outside of [0, 1).
    """
    if not math.isfinite(rho):
        raise FitError(f"steer2edit: {name} {rho!r} is not a finite number; give 0 to leave that block alone")
    if not 0 <= alpha < 1:
        raise FitError(f"steer2edit: alpha {alpha!r} is outside of 0 <= alpha < 1")
