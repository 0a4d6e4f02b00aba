"""Numbers as people and JSON read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from steerkit.evaluate.intervals import Estimate

__all__ = ["mean", "plain", "signed", "span"]


def mean(values: Sequence[float]) -> float:
    """The mean of some numbers.

    Args:
        values: at least one.
    """
    return sum(values) / len(values)


def span(found: Estimate) -> str:
    """An interval for people.

    Args:
        found: the estimate.
    """
    return f"{found.low:.3g} to {found.high:.3g}"


def signed(value: float) -> str:
    """A change for people, with its sign.

    Args:
        value: the change.
    """
    return f"{value:+.3g}"


def plain(value: Any) -> Any:
    """Plain data with None in the place of numbers that JSON does not have.

    Args:
        value: mappings, lists, tuples and what JSON holds.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
