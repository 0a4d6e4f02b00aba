"""The scale that a monitor counts in: mean and standard deviation of neutral texts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from steerkit.errors import DataError

__all__ = ["NeutralScale"]


class NeutralScale(NamedTuple):
    """Mean [s] and standard deviation [s] over neutral texts at each site, and that of the mean over sites."""

    mean: Tensor
    deviation: Tensor
    joint: float

    @classmethod
    def of(cls, values: Tensor) -> NeutralScale:
        """Find the scale in the projections of neutral texts.

        Args:
            values: [n, s] one row per text, one column per site; rows with nan could not be read.

        Raises:
            DataError: too few can be read, or they are all alike.
        """
        values = values[~values.isnan().any(dim=1)]
        if len(values) < 3:
            raise DataError(f"monitor: {len(values)} neutral texts can be read; give at least 3, with answers")
        mean, deviation = values.mean(dim=0), values.std(dim=0)
        if not bool((deviation > 0).all()):
            raise DataError("monitor: all neutral texts have the same projection; give different ones")
        return cls(mean, deviation, float(((values - mean) / deviation).mean(dim=1).std()))
