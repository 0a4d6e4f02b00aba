"""A score of how far a prompt meets a condition, and the threshold that parts two sets of such scores best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steerkit.errors import FitError

__all__ = ["Threshold", "best_threshold", "lies_above", "score"]


@dataclass(frozen=True)
class Threshold:
    """Where two sets of scores are parted.

    Attributes:
        value: the threshold.
        compare: ``above`` (met where the score is larger) or ``below`` (met where it is not).
        f1: of the positive side.
        tpr: share of the positive scores that meet it.
        fpr: share of the negative scores that meet it.
        margin: distance to the nearest score.
    """

    value: float
    compare: Literal["above", "below"]
    f1: float
    tpr: float
    fpr: float
    margin: float


def best_threshold(
    positive: Tensor,
    negative: Tensor,
    *,
    max_fpr: float | None = None,
    compare: Literal["auto", "above", "below"] = "auto",
) -> Threshold:
    """The threshold with the best F1, of equals the one furthest from all scores; exact, in O(n log n).

    Args:
        positive: [n] scores that should meet it.
        negative: [m] scores that should not.
        max_fpr: only thresholds that at most this share of the negative scores meet.
        compare: which side of it counts as met; ``auto`` tries both.

    Returns:
        The threshold; between two scores, or beyond all of them where none should meet it.

    Raises:
        FitError: a side is empty, a score is not finite, or `max_fpr` is no share.
    """
    if not len(positive) or not len(negative):
        raise FitError("a threshold needs scores of both sides; give at least one item of each")
    if max_fpr is not None and not 0 <= max_fpr <= 1:
        raise FitError(f"max_fpr {max_fpr!r} is no share; give a number from 0 to 1")
    scores = torch.cat([positive, negative]).double()
    if not bool(torch.isfinite(scores).all()):
        raise FitError("a score is not finite; load the model in float32 or bfloat16")
    values, order = scores.sort()
    is_positive = (torch.arange(len(scores)) < len(positive))[order]
    last = torch.cat([values[1:] != values[:-1], torch.tensor([True], dtype=torch.bool)])  # the last of equal scores
    below = is_positive.cumsum(0)[last], (~is_positive).cumsum(0)[last]
    steps = values[last]
    gaps = torch.cat([steps.diff() / 2, torch.zeros(1, dtype=torch.double)])
    middles = torch.where(steps + gaps < torch.cat([steps[1:], steps[-1:] + 1]), steps + gaps, steps)
    places = torch.cat([steps[:1] - 1, middles])  # below all scores, then behind each
    margins = torch.cat([torch.zeros(1, dtype=torch.double), gaps])
    under = [torch.cat([torch.zeros(1, dtype=torch.long), counts]) for counts in below]
    found = []
    for side in ("above", "below") if compare == "auto" else (compare,):
        hits, alarms = under if side == "below" else (len(positive) - under[0], len(negative) - under[1])
        f1 = 2 * hits.double() / (hits + alarms + len(positive)).double()
        fpr = alarms.double() / len(negative)
        allowed = torch.ones_like(fpr, dtype=torch.bool) if max_fpr is None else fpr <= max_fpr
        ranked = torch.where(allowed, f1, -1.0)
        at = int(torch.where(ranked == ranked.max(), margins, -1.0).argmax())
        found.append(
            Threshold(
                value=float(places[at]),
                compare="above" if side == "above" else "below",
                f1=float(f1[at]),
                tpr=float(hits[at]) / len(positive),
                fpr=float(fpr[at]),
                margin=float(margins[at]),
            )
        )
    return max(found, key=lambda one: (one.f1, one.margin))


def score(h: Tensor, condition: Tensor, kind: Literal["cosine", "cast"] = "cosine") -> Tensor:
    """How far activations meet a condition.

    Args:
        h: [b, d].
        condition: [d].
        kind: see the module.

    Returns:
        [b] float32, from -1 to 1; 0 where an activation is zero or, by `cast`, orthogonal to the condition.
    """
    h, condition = h.float(), condition.to(h.device).float()
    along = (h * condition).sum(dim=-1, keepdim=True)
    if kind == "cosine":
        other, inner = condition.expand_as(h), along[:, 0]
    else:
        other = torch.tanh(condition * (along / (condition * condition).sum()))
        inner = (h * other).sum(dim=-1)
    lengths = torch.linalg.vector_norm(h, dim=-1) * torch.linalg.vector_norm(other, dim=-1)
    return torch.where(lengths > 0, inner / lengths.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


def lies_above(scores: Tensor, threshold: float) -> Tensor:
    """`scores > threshold` [n], without rounding the threshold where the device has float64."""
    return scores > threshold if scores.device.type == "mps" else scores.double() > threshold
