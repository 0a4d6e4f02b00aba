"""Length of generated texts: what rates and repetition have to be read beside.

Steering that makes the model fall silent looks harmless everywhere else. Lengths are cut off at `Setup.max_new_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.trial import Trial

__all__ = ["Length"]


@dataclass(frozen=True)
class Length(Scorer):
    """Words, tokens and characters of generated texts, and how many are empty."""

    name: ClassVar[str] = "length"
    title: ClassVar[str] = "how long generated texts are"
    columns: ClassVar[Mapping[str, Column]] = {
        "words": Column("length in words", "words", share=False),
        "tokens": Column("length in tokens", "tokens", share=False),
        "characters": Column("length in characters", "characters", share=False),
        "empty": Column("empty texts", "share", "lower", share=True),
    }

    def score(self, trial: Trial) -> dict[str, Tensor]:
        """Score every generated text.

        Args:
            trial: whose texts are read.

        Returns:
            ``{"words": [n], "tokens": [n], "characters": [n], "empty": [n]}``. Tokens are those of the text as it
            reads, without end marks. A text of nothing but whitespace is empty.
        """
        rows = [(len(text.split()), self._tokens(trial, text), len(text), not text.strip()) for text in trial.texts]
        values = torch.tensor([list(map(float, row)) for row in rows], dtype=torch.float32)
        return {name: values[:, place] for place, name in enumerate(self.columns)}

    @staticmethod
    def _tokens(trial: Trial, text: str) -> int:
        # Without `verbose=False` the warning about long texts leaves a mark on the tokenizer.
        encoding = trial.setup.tokenizer(text, add_special_tokens=False, verbose=False)
        return len(encoding["input_ids"])
