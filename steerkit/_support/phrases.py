"""Words and phrases in texts, whatever the case, the apostrophes and the stretches of whitespace."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from steerkit.errors import DataError

__all__ = ["normalised", "opening", "pattern_of"]

# An underscore is markup ("_sorry_"), no letter.
_LETTER = r"[^\W_]"
_WORD = re.compile(rf"{_LETTER}+(?:'{_LETTER}+)*")
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\uff07\u0060\u00b4", "'"))


def normalised(text: str) -> str:
    """The text as it is compared: folded case, plain apostrophes, one space for every stretch of whitespace.

    Args:
        text: any text.
    """
    plain = unicodedata.normalize("NFC", text.translate(_APOSTROPHES)).casefold()
    return " ".join(plain.split())


def pattern_of(markers: Sequence[str]) -> re.Pattern[str]:
    """One expression that finds each of some words or phrases in a normalised text, as whole words.

    Where they overlap, the longest is found.

    Args:
        markers: the words or phrases.

    Raises:
        DataError: there is none, one is empty, or one is no text.
    """
    if isinstance(markers, str) or not all(isinstance(marker, str) for marker in markers):
        raise DataError(f"markers: got {markers!r}; give a list of texts")
    listed = sorted(map(normalised, markers), key=len, reverse=True)
    if not listed or not listed[-1]:
        raise DataError(f"markers: got {list(markers)!r}; give at least one word or phrase, none of them empty")
    # Only the ends that are letters need a word's end beside them; an apostrophe before a letter is inside a word.
    before, after = rf"(?<!{_LETTER})(?<!{_LETTER}')", rf"(?!'?{_LETTER})"
    parts = [
        (before if re.match(_LETTER, marker) else "")
        + re.escape(marker)
        + (after if re.match(_LETTER, marker[-1]) else "")
        for marker in listed
    ]
    return re.compile("|".join(parts))


def opening(text: str, first: int) -> str:
    """The beginning of a text, without a word that crosses its end.

    Args:
        text: any text.
        first: characters; 0 takes all of the text.
    """
    if not 0 < first < len(text):
        return text
    crossing = (word.start() for word in _WORD.finditer(text) if word.start() < first < word.end())
    return text[: next(crossing, first)]
