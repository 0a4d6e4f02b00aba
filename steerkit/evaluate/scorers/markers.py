"""Markers: the share of generated texts in which one of some words or phrases stands, such as those of a refusal.

    marker_rate(text) = 1 if any marker stands in the text, else 0
    markers_per_100_words(text) = 100 * places where a marker stands / words

A text is read without regard to case and to the kind of its apostrophes, with every stretch of whitespace as one space.
A marker has to stand as whole words: "can" is not found in "canned", nor in "can't". Where markers overlap, each place
counts once, for the longest. Such lists measure wording, not what is meant: read some of the texts too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit._support.phrases import normalised, opening, pattern_of
from steerkit.errors import DataError
from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.trial import Trial

__all__ = ["Markers"]


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
        pattern = pattern_of(self.markers)
        found, rates = [], []
        for text in trial.texts:
            window = opening(normalised(text), self.first)
            count, words = len(pattern.findall(window)), len(window.split())
            found.append(float(count > 0))
            rates.append(100.0 * count / words if words else 0.0)
        return {
            "marker_rate": torch.tensor(found, dtype=torch.float32),
            "markers_per_100_words": torch.tensor(rates, dtype=torch.float32),
        }
