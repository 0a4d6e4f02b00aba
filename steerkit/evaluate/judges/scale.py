"""The number of a judge's answer: read as text, or expected from the probabilities of all numbers of the scale."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping

from steerkit.errors import DataError

__all__ = [
    "LEAST_MASS",
    "broken_up",
    "check_scale",
    "expected_score",
    "expected_value",
    "may_split_numbers",
    "parse_score",
]

LEAST_MASS = 0.25
LARGEST_SCALE = 1000
LONGEST_ANSWER = 200  # characters; what is longer is not a number and nothing else
_WHOLE = re.compile(r"[\s▁Ġ]*(0|[1-9][0-9]*)\s*")
_MARKUP = re.compile(r"[*_`\"'\[\]]")
_LABEL = r"(?:(?:(?:final|overall)\s+)?(?:score|rating|grade|answer)\b\s*(?::|=|is\b)?\s*)?"
_SCORED = re.compile(
    rf"\s*{_LABEL}((?:0|[1-9][0-9]*)(?:\.[0-9]+)?)(?:\s*(?:/|out\s+of)\s*([0-9]+))?\s*\.?\s*", re.IGNORECASE | re.ASCII
)


def expected_score(
    tops: Iterable[tuple[str, float]], low: int, high: int, *, least_mass: float = LEAST_MASS
) -> float | None:
    """The expected number over the likeliest tokens.

    Args:
        tops: tokens with their log-probabilities, nats; those that spell no whole number of the scale are left out.
        low: lower end of the scale.
        high: upper end.
        least_mass: probability of all numbers together below which there is no score.

    Returns:
        A number within the scale, or None.

    Example:
        >>> tops = [("7", -0.693147), ("9", -1.386294), ("Well", -1.386294)]  # probabilities 1/2, 1/4, 1/4
        >>> round(expected_score(tops, 0, 10), 3)  # (7/2 + 9/4) / (3/4)
        7.667
    """
    masses: dict[int, float] = {}
    for token, log_prob in tops:
        spelled = _WHOLE.fullmatch(token)
        if spelled and len(spelled[1]) <= len(str(high)) and low <= int(spelled[1]) <= high:
            masses[int(spelled[1])] = masses.get(int(spelled[1]), 0.0) + math.exp(min(log_prob, 0.0))
    return expected_value(masses, least_mass)


def parse_score(text: str, low: int, high: int) -> float | None:
    """Read an answer that is one number and nothing else.

    Args:
        text: ``7``, ``7/10``, ``Score: 7``, ``**7**``, ``Rating: [[7]]``, ``{"score": 7}``.
        low: lower end of the scale.
        high: upper end; what stands behind a slash has to be this.

    Returns:
        The number, or None for anything else: two numbers, one beyond the scale, a range, words, nothing.
    """
    text = text.strip()
    if len(text) > LONGEST_ANSWER:
        return None
    if text.startswith("{"):
        number = _of_json(text)
    else:
        # Spaces, not nothing: "1*0" must not become 10.
        found = _SCORED.fullmatch(_MARKUP.sub(" ", text))
        if found is None or (found[2] is not None and float(found[2]) != high):
            return None
        number = float(found[1])
    return number if number is not None and low <= number <= high else None


def check_scale(low: int, high: int) -> None:
    """Refuse what is no scale.

    Args:
        low: lower end.
        high: upper end.

    Raises:
        DataError: with what is allowed.
    """
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in (low, high))
    if not whole or not 0 <= low < high <= LARGEST_SCALE:
        raise DataError(f"scale {low!r} to {high!r}: give two whole numbers from 0 to {LARGEST_SCALE}, the lower first")


def expected_value(masses: Mapping[int, float], least_mass: float) -> float | None:
    """The mean of numbers by their probabilities, None where these add up to too little."""
    total = sum(masses.values())
    if not total > 0 or total < least_mass:
        return None
    return sum(number * mass for number, mass in masses.items()) / total


def may_split_numbers(tops: Iterable[tuple[str, float]], low: int, high: int) -> bool:
    """Whether a token may be the first digit of a longer number of the scale rather than a number."""
    numbers = [found[1] for found in (_WHOLE.fullmatch(token) for token, _ in tops) if found]
    if any(len(number) > 1 for number in numbers):
        return False
    longer = {str(number)[0] for number in range(max(low, 10), high + 1)}
    return bool(longer & set(numbers))


def _of_json(text: str) -> float | None:
    """The number of an object with a score and nothing else."""
    try:
        # Pairs, not a dict: the same key twice is two answers.
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    if len(pairs) != 1 or pairs[0][0].lower() not in ("score", "rating"):
        return None
    value = pairs[0][1]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def broken_up(text: str, special: Iterable[str]) -> str:
    """Break up special tokens that a text spells out by a space, so that a tokenizer reads them as plain text."""
    longest_first = sorted((token for token in special if len(token) > 1), key=len, reverse=True)
    if not longest_first:
        return text
    return re.sub("|".join(map(re.escape, longest_first)), lambda found: f"{found[0][0]} {found[0][1:]}", text)
