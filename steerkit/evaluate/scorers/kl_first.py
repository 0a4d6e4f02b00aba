"""How far steering moves the first tokens of an answer, where refusal is decided: KL to the unsteered model.

    kl_first = mean over the first k answer tokens of sum over v of p_base(v) * (log p_base(v) - log p_steered(v))

The answer is the unsteered model's own (greedy), and both are shown it token by token, so that they are compared on the
same text. The first of the k depends on the prompt alone. The scorer `divergence` compares on neutral texts instead,
over whole answers, in which a change of the first tokens disappears.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.errors import DataError
from steerkit.evaluate.scorers._answers import answer_kl
from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.trial import Trial
from steerkit.prompts.rendering import Rendered

__all__ = ["FirstDivergence"]


@dataclass(frozen=True)
class FirstDivergence(Scorer):
    """KL divergence to the unsteered model at the first tokens of its own answers.

    Attributes:
        first: tokens that are compared, at most.
    """

    first: int = 5

    name: ClassVar[str] = "kl_first"
    title: ClassVar[str] = "how far the first tokens of answers move from the unsteered model's"
    against_baseline: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, Column]] = {
        "kl_first": Column("KL divergence, first tokens", "nats per token", "lower", share=False),
    }

    def score(self, trial: Trial) -> dict[str, Tensor]:
        """Score every prompt.

        Args:
            trial: whose prompts are read.

        Returns:
            ``{"kl_first": [n]}``, nats per token; nan where the unsteered model answers nothing.

        Raises:
            DataError: `first` is below 1.
        """
        if self.first < 1:
            raise DataError(f"kl_first: first = {self.first}; give a number of tokens of at least 1")
        setup = trial.setup
        answered = [(place, text) for place, text in enumerate(trial.baseline.texts) if text]
        scores = torch.full((len(setup.asked),), math.nan, dtype=torch.float32)
        if trial.is_baseline:  # at no distance from itself; no pass is needed to say so
            scores[[place for place, _ in answered]] = 0.0
            return {"kl_first": scores}
        said = [replace(setup.asked[place], answer=text) for place, text in answered]
        own, plain = ([self._cut(one.render(item)) for item in said] for one in (setup, trial.baseline.setup))
        for (place, _), kl in zip(answered, trial.over_answers(own, answer_kl, beside=plain), strict=True):
            scores[place] = kl.mean()
        return {"kl_first": scores}

    def _cut(self, text: Rendered) -> Rendered:
        return replace(text, ids=text.ids[: text.prompt_length + self.first])
