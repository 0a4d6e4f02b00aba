"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from steerkit.evaluate.intervals import Estimate

__all__ = ["mean", "signed", "span"]


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
