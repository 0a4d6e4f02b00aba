"""System prompts that ask for a behaviour, and for its opposite: what steering is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from steerkit.errors import DataError
from steerkit.prompts.conversation import SIDES, check_text

__all__ = ["SystemPrompts"]


@dataclass(frozen=True)
class SystemPrompts:
    """Wordings of both sides, in pairs: the n-th of one side is alike in length and form to the n-th of the other.

    Attributes:
        positive: each asks for the behaviour.
        negative: each asks for its opposite.

    Raises:
        DataError: a side is empty or holds a text twice or without a word in it, or the sides are not equally many.

    Example:
        >>> len(SystemPrompts(("Be glad.", "Sound happy."), ("Be sad.", "Sound gloomy.")))
        2
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def __post_init__(self) -> None:
        for side in SIDES:
            texts = tuple(getattr(self, side))
            object.__setattr__(self, side, texts)
            if not texts:
                raise DataError(f"{side} has no system prompt; give at least one wording, better three")
            for number, text in enumerate(texts, start=1):
                check_text(f"{side} {number}", text)
                if not text.strip():
                    raise DataError(f"{side} {number} is {text!r}; give a system prompt with words in it")
                if text in texts[: number - 1]:
                    raise DataError(f"{side} {number} stands there twice ({text[:40]!r}); give another wording")
        if len(self.positive) != len(self.negative):
            raise DataError(
                f"{len(self.positive)} positive and {len(self.negative)} negative system prompts; give as many of each"
            )

    def __len__(self) -> int:
        return len(self.positive)
