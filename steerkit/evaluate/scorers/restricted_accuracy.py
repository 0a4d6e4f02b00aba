"""Restricted accuracy: how often the positive answer beats the negative one where the two differ first.

    1 if logit(positive answer's token) > logit(negative answer's token), else 0

at the first token in which the two answers to one prompt differ, given all that they share: the arg max restricted to
the two. Unlike accuracy it does not ask the model to give one of the two answers at all.

Hojer, Jarvis, Heinrich (2025), "Improving Reasoning Performance in Large Language Models via Representation
Engineering", arXiv 2504.19483. Where this file departs: the published code compares the answers' first tokens, also
where they are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.errors import DataError
from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.scorers._forks import fork, fork_logits
from steerkit.evaluate.trial import Trial

__all__ = ["RestrictedAccuracy"]


@dataclass(frozen=True)
class RestrictedAccuracy(Scorer):
    """Share of pairs whose positive answer is the likelier one where the two differ first."""

    name: ClassVar[str] = "restricted_accuracy"
    title: ClassVar[str] = "how often the positive answer beats the negative one at their first different token"
    source: ClassVar[str] = "Hojer et al. 2025, arXiv 2504.19483"
    of_pairs: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, Column]] = {
        "restricted_accuracy": Column("restricted accuracy", "share", "higher", share=True, steered=True),
    }

    def score(self, trial: Trial) -> dict[str, Tensor]:
        """Score every pair.

        Args:
            trial: needs data with both answers to each prompt.

        Returns:
            ``{"restricted_accuracy": [n]}``, 0 or 1; a tie is 0. Where one answer is the other's beginning there is no
            token to compare: nan.

        Raises:
            DataError: a pair lacks an answer or has two prompts, or its two answers are the same tokens.
        """
        forks = []
        for number, (positive, negative) in enumerate(trial.setup.pairs):
            if positive.ids == negative.ids:
                raise DataError(f"item {number}: both answers are the same tokens; give two that differ")
            forks.append(fork(positive, negative))
        places = [place for place, found in enumerate(forks) if found is not None]
        scores = torch.full((len(forks),), math.nan, dtype=torch.float32)
        logits = fork_logits(trial, [found for found in forks if found is not None])
        scores[places] = (logits[:, 0] > logits[:, 1]).float()
        return {"restricted_accuracy": scores}
