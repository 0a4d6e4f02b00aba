"""ActAdd's perplexity ratio: does steering make texts of the wanted kind likelier, and leave the others alone?

    ratio(group) = exp( sum over texts and tokens of (log p_base - log p_steered)  /  number of tokens )

Below 1 the steered model predicts the group better. On topic are the positive answers of the data, off topic the
neutral texts.

Turner, Thiergart, Leech, Udell, Vazquez, Mini, MacDiarmid (2023), "Steering Language Models With Activation
Engineering", arXiv 2308.10248.

Where this file departs. The paper reads plain documents and leaves out the first predicted positions, on which the
addition itself lies; here prompts stand before the answers and only answer tokens are counted. `skip` leaves out the
first of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from steerkit.errors import DataError
from steerkit.evaluate.scorers._answers import calm_texts, log_probs, on_topic_texts, token_counts
from steerkit.evaluate.scorers._base import Column, Scorer, Weighted
from steerkit.evaluate.trial import Trial
from steerkit.prompts.rendering import Rendered

__all__ = ["TopicPerplexity"]


@dataclass(frozen=True)
class TopicPerplexity(Scorer):
    """Perplexity under steering over that of the unsteered model, on topic and off topic.

    Attributes:
        skip: so many of each answer's first tokens are left out; an answer that has no more cannot be scored.
    """

    skip: int = 0

    name: ClassVar[str] = "topic_perplexity"
    title: ClassVar[str] = "perplexity ratio to the unsteered model, of positive answers and of neutral texts"
    source: ClassVar[str] = "Turner et al. 2023, arXiv 2308.10248"
    against_baseline: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, Column]] = {
        "on_topic": Column("perplexity ratio, on topic", "steered / unsteered", "lower", "log", share=False),
        "off_topic": Column("perplexity ratio, off topic", "steered / unsteered", "lower", "log", share=False),
    }

    def score(self, trial: Trial) -> dict[str, Weighted]:
        """Score every positive answer and every neutral text.

        Args:
            trial: needs data with positive answers.

        Returns:
            ``{"on_topic": [n], "off_topic": [m]}``: mean log-ratio per token, nats, each weighted by its tokens.

        Raises:
            DataError: an item has no positive answer, a neutral text no answer, `skip` is negative, or it leaves no
                token of any text.
        """
        if self.skip < 0:
            raise DataError(f"topic_perplexity: skip = {self.skip}; give a number of tokens of at least 0")
        setup = trial.setup
        return {
            "on_topic": self._ratios(trial, on_topic_texts(setup)),
            "off_topic": self._ratios(trial, calm_texts(setup)),
        }

    def _ratios(self, trial: Trial, texts: Sequence[Rendered]) -> Weighted:
        counts = token_counts(texts) - self.skip
        if not bool((counts > 0).any()):
            raise DataError(f"topic_perplexity: skip = {self.skip} leaves no token of any answer; give a smaller one")
        base, steered = log_probs(trial.baseline, texts), log_probs(trial, texts)
        # The mean of nothing is nan: an answer that is too short to be scored.
        means = [(before - after)[self.skip :].mean() for before, after in zip(base, steered, strict=True)]
        return Weighted(torch.stack(means), counts.clamp_min(1))
