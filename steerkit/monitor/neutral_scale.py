"""The scale that a monitor counts in: mean and standard deviation of neutral texts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["NeutralScale"]


class NeutralScale(NamedTuple):
    """Mean [s] and standard deviation [s] over neutral texts at each site, and that of the mean over sites."""

    mean: Tensor
    deviation: Tensor
    joint: float
