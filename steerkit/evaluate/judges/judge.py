"""What a judge is: anything that scores filled rubrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

__all__ = ["Judge"]


@runtime_checkable
class Judge(Protocol):
    """Whatever turns prompts into numbers of a scale."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def score(self, prompts: Sequence[str], *, low: int = 0, high: int = 10) -> list[float | None]:
        """Score every prompt.

        Args:
            prompts: each asks for one whole number.
            low: lower end of the scale.
            high: upper end.

        Returns:
            One number each, or None where the judge gave none.
        """
