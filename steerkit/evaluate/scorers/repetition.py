"""Repetition of generated texts, which perplexity does not see: a model in a loop predicts itself well.

    repetition    = 1 - different n-grams / n-grams
    ngram_entropy = entropy of the n-grams in bits / log2(n-grams)

over whitespace words. A word of more than 30 characters is taken apart into its characters: a text without spaces
(Chinese, or a loop such as "!!!!") would else be one word, without any n-gram.

A text of T words that repeats the same L words without end has L different n-grams among T - n + 1. So its repetition
is 1 - L / (T - n + 1): with 40 words and n = 4, 0.97 for a loop of one word, 0.86 for one of five, 0.46 for one of
twenty. Ordinary text of that length has about 0; a text that falls into a loop at its middle has about half. The
entropy is 1 where all n-grams differ, and 0 for a loop of one word.

An empty text, and any of fewer than n words, counts as 0: see `length` beside it. But where the unsteered model had
something to say, an empty text counts as 1, the worst there is: a model that falls silent does not repeat itself less.

Yao et al. (2025), "Understanding the Repeat Curse in Large Language Models from a Feature Perspective", arXiv
2504.14218, has both measures. Where this file departs: the published code counts single words; here n-grams are of four
words, so that ordinary words that come again are no repetition.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.errors import DataError
from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.trial import Trial

__all__ = ["Repetition", "repeated_share"]

_LONGEST = 30


@dataclass(frozen=True)
class Repetition(Scorer):
    """Share of repeated n-grams in generated texts, and how evenly n-grams are spread.

    Attributes:
        n: words of an n-gram.
    """

    n: int = 4

    name: ClassVar[str] = "repetition"
    title: ClassVar[str] = "how much generated texts repeat themselves"
    source: ClassVar[str] = "Yao et al. 2025, arXiv 2504.14218"
    columns: ClassVar[Mapping[str, Column]] = {
        "repetition": Column("repeated n-grams", "share", "lower", share=False, worst=1.0),
        "ngram_entropy": Column("entropy of n-grams", "share of the most possible", "higher", share=False, worst=0.0),
    }

    def score(self, trial: Trial) -> dict[str, Tensor]:
        """Score every generated text.

        Args:
            trial: whose texts are read.

        Returns:
            ``{"repetition": [n], "ngram_entropy": [n]}``; 0 and 1 for texts of fewer than n words, nan
            for those that steering made empty.

        Raises:
            DataError: `n` is below 1.
        """
        if self.n < 1:
            raise DataError(f"repetition: n = {self.n}; give a number of words of at least 1")
        counts = [_ngrams(text, self.n) for text in trial.texts]
        silent = [not text.strip() and bool(before.strip()) for text, before in self._beside(trial)]
        return {
            name: torch.tensor(
                [math.nan if fell else of(one) for one, fell in zip(counts, silent, strict=True)], dtype=torch.float32
            )
            for name, of in (("repetition", _repeated), ("ngram_entropy", _evenness))
        }

    @staticmethod
    def _beside(trial: Trial) -> Iterable[tuple[str, str]]:
        """Every text with that of the unsteered model."""
        return zip(trial.texts, trial.texts if trial.is_baseline else trial.baseline.texts, strict=True)


def repeated_share(text: str, n: int = 4) -> float:
    """Share of the n-grams of one text that stood there before; 0 for fewer than n words.

    Args:
        text: any text.
        n: words of an n-gram.

    Example:
        >>> repeated_share("to be or not to be or not to be")  # seven 4-grams, four different ones
        0.4285714285714286
    """
    return _repeated(_ngrams(text, n))


def _ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = [part for word in text.split() for part in (word if len(word) > _LONGEST else [word])]
    return Counter(tuple(words[place : place + n]) for place in range(len(words) - n + 1))


def _repeated(counts: Counter[tuple[str, ...]]) -> float:
    total = counts.total()
    return 1.0 - len(counts) / total if total else 0.0


def _evenness(counts: Counter[tuple[str, ...]]) -> float:
    """Entropy of the n-grams as a share of the largest that so many could have."""
    total = counts.total()
    if total < 2:
        return 1.0
    bits = sum(count / total * math.log2(total / count) for count in counts.values())
    return bits / math.log2(total)
