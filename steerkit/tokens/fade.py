"""`Fade`: how a strength goes from one value to another while tokens are generated.

    linear        what is left of the way:  1 - k / n           up to token n, then nothing
    cosine                                  (1 + cos(pi k / n)) / 2      the same, slow at both ends
    exponential                             2 ** (-k / n)       halved every n tokens, for good

k is the generated token that a position chooses: the last prompt token chooses token 0. Every token before it counts as
0, so a text begins anew with each `generate` and each row.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from steerkit.errors import StrengthError, near_miss

__all__ = ["SHAPES", "Fade"]

SHAPES = ("linear", "exponential", "cosine")
_TEXT = re.compile(r"\s*([A-Za-z_]+)\s+over\s+([0-9]{1,9})(?:\s+to\s+(\S+))?\s*")
_MOST, _LARGEST = 10**9 - 1, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Fade:
    """A schedule of strength over generated tokens. A constant strength has none.

    Attributes:
        shape: `linear`, `cosine` or `exponential`; see the module.
        over: tokens that it takes; of `exponential` those in which what is left is halved.
        to: the strength at its end, in the unit of the strength that it begins with.

    Raises:
        StrengthError: an unknown shape, a number of tokens below 1, or an end that is not finite.

    Example:
        >>> import torch
        >>> Fade.parse("linear over 4 to 0.5").share(torch.arange(6))
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000, 0.0000])
    """

    shape: str
    over: int
    to: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise StrengthError(
                f"fade: unknown shape {str(self.shape)[:20]!r}; {near_miss(str(self.shape)[:20], SHAPES)}"
            )
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (self.over, self.to))
        if not numbers or not 1 <= self.over <= _MOST or self.over != int(self.over) or not abs(self.to) <= _LARGEST:
            got = f"over {str(self.over)[:20]} to {str(self.to)[:20]}"
            raise StrengthError(f"fade: got {got}; give 1 to {_MOST} tokens, and a finite strength")
        object.__setattr__(self, "over", int(self.over))
        object.__setattr__(self, "to", float(self.to) + 0.0)

    @classmethod
    def parse(cls, text: str | Fade) -> Fade:
        """Read a fade from its text.

        Args:
            text: such as ``"linear over 40"`` or ``"cosine over 40 to 0.5"``.

        Raises:
            StrengthError: the text is none.
        """
        if isinstance(text, Fade):
            return text
        if not isinstance(text, str):
            raise StrengthError(f"fade: got {repr(text)[:40]}; give a text, such as 'linear over 40'")
        found = _TEXT.fullmatch(text)
        try:
            end = float(found[3] or 0.0) if found else 0.0
        except ValueError:
            found = None
        if not found:
            raise StrengthError(f"fade {text[:40]!r}: write it as 'linear over 40' or 'cosine over 40 to 0.5'")
        return cls(found[1], int(found[2]), end)

    def __str__(self) -> str:
        short = f"{self.to:g}"
        end = short if float(short) == self.to else repr(self.to)
        return f"{self.shape} over {self.over}" + (f" to {end}" if self.to else "")

    def ends_before(self, step: int) -> bool:
        """Whether nothing is left at a generated token.

        Args:
            step: its number, from 0.
        """
        return self.shape != "exponential" and step >= self.over

    def share(self, steps: Tensor) -> Tensor:
        """How much of the way from the end back to the beginning is left.

        Args:
            steps: [...] generated tokens, counted from 0.

        Returns:
            [...] float32 between 0 and 1.
        """
        done = steps.float() / self.over
        if self.shape == "exponential":
            return torch.exp2(-done)
        done = done.clamp_max(1.0)
        return 1.0 - done if self.shape == "linear" else 0.5 + 0.5 * torch.cos(math.pi * done)
