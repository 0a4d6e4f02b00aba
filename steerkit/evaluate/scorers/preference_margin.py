"""Preference margin: how much more likely the model finds the positive answer than the negative one, per token.

    margin(item) = mean over tokens of log p(positive answer | prompt)  -  the same of the negative answer

Teacher-forced under steering. Means per token, so that longer answers do not count for more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.trial import Trial

__all__ = ["PreferenceMargin"]


@dataclass(frozen=True)
class PreferenceMargin(Scorer):
    """Mean log-probability per token of the positive answer minus that of the negative one."""

    name: ClassVar[str] = "preference_margin"
    title: ClassVar[str] = "how much likelier the positive answer is than the negative one"
    by_item: ClassVar[bool] = True
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
        texts = [text for pair in trial.setup.pairs for text in pair]
        means = torch.stack([tokens.mean() for tokens in trial.log_probs(texts)])
        return {"preference_margin": means[0::2] - means[1::2]}
