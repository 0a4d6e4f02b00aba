"""The operating point of a gate: the lowest threshold that keeps a promise about prompts it should leave alone.

    promise      with `confidence`, at most a share `a` of such prompts open the gate
    threshold    the (k + 1)th largest of n calibration scores, where k is the largest number with
                 P(Binomial(n, a) <= k) <= 1 - confidence

The share of all such prompts that score above the (k + 1)th largest of n is distributed as Beta(k + 1, n - k), whatever
the scores' own distribution is, and that exceeds `a` with exactly the probability above. So the promise holds for any
gate and model, on prompts of the kind that the calibration prompts are of, and on no others (split conformal
prediction: Vovk, Gammerman, Shafer 2005, "Algorithmic Learning in a Random World"; Vovk 2012, arXiv 1209.2673).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import bdtr, bdtri
from torch import Tensor

from steerkit.errors import FitError

__all__ = ["OperatingPoint", "checked_promise", "least_items", "most_alarms", "operating_point"]


@dataclass(frozen=True)
class OperatingPoint:
    """Where a gate opens, and what that promises.

    Attributes:
        threshold: the gate opens above it.
        items: calibration scores.
        alarms: how many of them lie above it.
        bound: the share of all such prompts that opens the gate is at most this, with the confidence asked for.
        max_false_alarm: the share that was asked for.
        confidence: of the promise.
    """

    threshold: float
    items: int
    alarms: int
    bound: float
    max_false_alarm: float
    confidence: float

    @property
    def facts(self) -> dict[str, Any]:
        """What a vector file says of it, the threshold aside, which is the gate's own."""
        return {
            "max_false_alarm": self.max_false_alarm,
            "confidence": self.confidence,
            "bound": round(self.bound, 4),
            "calibration_items": self.items,
            "calibration_alarms": self.alarms,
        }


def checked_promise(max_false_alarm: float, confidence: float) -> None:
    """Refuse shares that are none.

    Args:
        max_false_alarm: share of prompts that may open the gate.
        confidence: of the promise.

    Raises:
        FitError: one of them is not between 0 and 1.
    """
    for name, value in (("max_false_alarm", max_false_alarm), ("confidence", confidence)):
        if not 0 < value < 1:
            raise FitError(f"{name} {value!r}: give a share over 0 and under 1, such as 0.05 and 0.95")


def least_items(max_false_alarm: float, confidence: float) -> int:
    """Calibration prompts without which nothing can be promised: 59 for 5 % with 95 %.

    Args:
        max_false_alarm: share of prompts that may open the gate.
        confidence: of the promise.
    """
    return math.ceil(math.log(1 - confidence) / math.log(1 - max_false_alarm))


def most_alarms(items: int, max_false_alarm: float, confidence: float) -> int:
    """The largest k with P(Binomial(items, max_false_alarm) <= k) <= 1 - confidence; -1 where there is none.

    Args:
        items: calibration prompts.
        max_false_alarm: share of prompts that may open the gate.
        confidence: of the promise.
    """
    chances = bdtr(np.arange(items, dtype=np.float64), items, max_false_alarm)
    return int(np.searchsorted(chances, 1 - confidence, side="right")) - 1


def operating_point(scores: Tensor, max_false_alarm: float, confidence: float) -> OperatingPoint:
    """The lowest threshold that keeps the promise.

    Args:
        scores: [n] of calibration prompts that should not open the gate and had no part in the fit; larger opens.
        max_false_alarm: share of such prompts that may open it.
        confidence: of the promise.

    Returns:
        The point; `threshold` is one of the scores.

    Raises:
        FitError: there are too few scores to promise so much, one is not finite, or a share is none.

    Example:
        >>> import torch
        >>> found = operating_point(torch.arange(100.0), max_false_alarm=0.05, confidence=0.95)
        >>> found.threshold, found.alarms, round(found.bound, 3)
        (98.0, 1, 0.047)
    """
    checked_promise(max_false_alarm, confidence)
    count, values = len(scores), scores.double()
    if not bool(torch.isfinite(values).all()):
        raise FitError("a score of a calibration prompt is not finite; load the model in float32 or bfloat16")
    alarms = most_alarms(count, max_false_alarm, confidence)
    if alarms < 0:
        least = least_items(max_false_alarm, confidence)
        raise FitError(
            f"{count} calibration prompts cannot promise at most {100 * max_false_alarm:g} % false alarms with "
            f"{100 * confidence:g} % confidence; keep {least} or more apart from the fit, or promise less"
        )
    threshold = float(values.sort(descending=True).values[alarms])
    return OperatingPoint(
        threshold=threshold,
        items=count,
        alarms=int((values > threshold).sum()),
        bound=float(bdtri(alarms, count, 1 - confidence)),
        max_false_alarm=max_false_alarm,
        confidence=confidence,
    )
