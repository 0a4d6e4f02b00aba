"""Perplexity of neutral texts: what steering costs where it has nothing to do.

    perplexity = exp( sum over texts and tokens of -log p(token | what stands before)  /  number of tokens )

Teacher-forced under steering, over the answers of `Setup.calm`. Texts that the steered model writes by itself are no
measure of health: a loop has a low perplexity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from steerkit.evaluate.scorers._answers import calm_texts, log_probs, token_counts
from steerkit.evaluate.scorers._base import Column, Scorer, Weighted
from steerkit.evaluate.trial import Trial

__all__ = ["Perplexity"]


@dataclass(frozen=True)
class Perplexity(Scorer):
    """Perplexity of neutral answers; the change is shown as the ratio to the unsteered model."""

    name: ClassVar[str] = "perplexity"
    title: ClassVar[str] = "how badly the model predicts neutral texts"
    columns: ClassVar[Mapping[str, Column]] = {
        "perplexity": Column("perplexity of neutral texts", "per token", "lower", "log", share=False),
    }

    def score(self, trial: Trial) -> dict[str, Weighted]:
        """Score every neutral text.

        Args:
            trial: whose neutral texts are read.

        Returns:
            ``{"perplexity": [n]}``: mean negative log-likelihood per token, nats, each weighted by its tokens.

        Raises:
            DataError: a neutral text has no answer.
        """
        texts = calm_texts(trial.setup)
        means = torch.stack([-tokens.mean() for tokens in log_probs(trial, texts)])
        return {"perplexity": Weighted(means, token_counts(texts))}
