"""Markers: the share of generated texts in which one of some words or phrases stands, such as those of a refusal.

    marker_rate(text) = 1 if any marker stands in the text, else 0
    markers_per_100_words(text) = 100 * places where a marker stands / words

A text is read without regard to case and to the kind of its apostrophes, with every stretch of whitespace as one space.
A marker has to stand as whole words: "can" is not found in "canned", nor in "can't". Where markers overlap, each place
counts once, for the longest. Such lists measure wording, not what is meant: read some of the texts too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.errors import DataError
from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.trial import Trial

__all__ = ["Markers"]

# An underscore is markup ("_sorry_"), no letter.
_LETTER = r"[^\W_]"
_WORD = re.compile(rf"{_LETTER}+(?:'{_LETTER}+)*")
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\uff07\u0060\u00b4", "'"))


@dataclass(frozen=True)
class Markers(Scorer):
    """How often generated texts hold one of some words or phrases.

    Attributes:
        markers: the words or phrases; at least one has to be given.
        first: look at so many characters from the text's beginning only (a word across the end is left out); 0 looks at
            all of it.
    """

    markers: tuple[str, ...] = ()
    first: int = 0

    name: ClassVar[str] = "markers"
    title: ClassVar[str] = "how often generated texts hold one of the given words or phrases"
    columns: ClassVar[Mapping[str, Column]] = {
        "marker_rate": Column("texts with a marker", "share", share=True),
        "markers_per_100_words": Column("markers", "per 100 words", share=False),
    }

    def score(self, trial: Trial) -> dict[str, Tensor]:
        """Score every generated text.

        Args:
            trial: whose texts are read.

        Returns:
            ``{"marker_rate": [n], "markers_per_100_words": [n]}``; a text without words has none of them.

        Raises:
            DataError: there is no marker, one is empty or no text, or `first` is negative.
        """
        if self.first < 0:
            raise DataError(f"markers: first = {self.first}; give a number of characters, or 0 for the whole text")
        pattern = _pattern(self.markers)
        found, rates = [], []
        for text in trial.texts:
            window = _window(_normalised(text), self.first)
            count, words = len(pattern.findall(window)), len(window.split())
            found.append(float(count > 0))
            rates.append(100.0 * count / words if words else 0.0)
        return {"marker_rate": torch.tensor(found), "markers_per_100_words": torch.tensor(rates)}


def _normalised(text: str) -> str:
    plain = unicodedata.normalize("NFC", text.translate(_APOSTROPHES)).casefold()
    return " ".join(plain.split())


def _pattern(markers: Sequence[str]) -> re.Pattern[str]:
    """One expression for all markers, the longest first."""
    if isinstance(markers, str) or not all(isinstance(marker, str) for marker in markers):
        raise DataError(f"markers: got {markers!r}; give a list of texts")
    listed = sorted(map(_normalised, markers), key=len, reverse=True)
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


def _window(text: str, first: int) -> str:
    """The beginning of a text, without a word that crosses its end."""
    if not 0 < first < len(text):
        return text
    crossing = (word.start() for word in _WORD.finditer(text) if word.start() < first < word.end())
    return text[: next(crossing, first)]
