"""Preference margin: how much more likely the model finds the positive answer than the negative one, per token.

    margin(item) = mean over tokens of log p(positive answer | prompt)  -  the same of the negative answer

Teacher-forced under steering. Means per token, so that longer answers do not count for more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.trial import Answer, Trial, token_log_probs

if TYPE_CHECKING:
    from steerkit.evaluate.setup import Setup
    from steerkit.prompts.rendering import Rendered

__all__ = ["PreferenceMargin"]


@dataclass(frozen=True)
class PreferenceMargin(Scorer):
    """Mean log-probability per token of the positive answer minus that of the negative one."""

    name: ClassVar[str] = "preference_margin"
    title: ClassVar[str] = "how much likelier the positive answer is than the negative one"
    by_item: ClassVar[bool] = True
    of_pairs: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, Column]] = {
        "preference_margin": Column("preference margin", "nats per token", "higher", share=False, steered=True),
    }

    def score(self, trial: Trial) -> dict[str, Tensor]:
        """Score every pair.

        Args:
            trial: needs data with both answers to each prompt.

        Returns:
            ``{"preference_margin": [n]}``

        Raises:
            DataError: a pair lacks an answer or has two prompts.
        """
        means = torch.stack([tokens.mean() for tokens in trial.log_probs(self.texts(trial.setup))])
        return {"preference_margin": self.of_items(means)}

    def texts(self, setup: Setup) -> list[Rendered]:
        """Both answers of each pair, one after the other.

        Args:
            setup: where the pairs stand.

        Raises:
            DataError: a pair lacks an answer or has two prompts.
        """
        return [text for pair in setup.pairs for text in pair]

    def of_text(self, answer: Answer) -> Tensor:
        """Mean log-probability of an answer's tokens.

        Args:
            answer: with the model's logits [t, v].

        Returns:
            []
        """
        return token_log_probs(answer).mean()

    def of_items(self, values: Tensor) -> Tensor:
        """The positive answer's minus the negative one's.

        Args:
            values: [..., 2n], of the texts.

        Returns:
            [..., n]
        """
        return values[..., 0::2] - values[..., 1::2]
