"""A pair of instructions, alike but for the trait, and the marks of places that nobody has written yet."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FILL_IN", "SIDES", "Instruction", "is_open"]

FILL_IN = "<fill in: "
"""How the text of a place begins that nobody has written yet."""
SIDES = ("positive", "negative")


class Instruction(NamedTuple):
    """Two instructions, alike but for the trait.

    Attributes:
        positive: asks for the trait.
        negative: asks for its opposite.
    """

    positive: str
    negative: str


def is_open(text: str) -> bool:
    """Tell whether nobody has written this text yet.

    Args:
        text: of a specification.
    """
    return FILL_IN in text
