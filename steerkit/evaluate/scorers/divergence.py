"""How far steering moves the model's predictions on neutral texts, against the unsteered model.

    kl               = sum over v of p_base(v) * (log p_base(v) - log p_steered(v))        nats per token
    entropy_change   = H(p_steered) - H(p_base)                                            bits per token
    agreement        = share of positions at which both predict the same token
    perplexity_ratio = exp( mean of log p_base(token) - log p_steered(token) )             of the texts' own tokens

Teacher-forced over the answer tokens of `Setup.calm`. KL, entropy and their changes with the strength are the measures
of Hojer, Jarvis, Heinrich (2025), "Improving Reasoning Performance in Large Language Models via Representation
Engineering", arXiv 2504.19483.

Where this file departs. The published code adds 1e-8 inside the logarithm, which bounds the KL divergence from above
where the steered model rules out what the other one says; here both sides are log-softmax. It reads the last token of a
question only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.evaluate.scorers._answers import calm_pairs, expected, tiles, token_counts, token_kl
from steerkit.evaluate.scorers._base import Column, Scorer, Weighted
from steerkit.evaluate.trial import Answer, Trial

__all__ = ["Divergence"]


@dataclass(frozen=True)
class Divergence(Scorer):
    """KL divergence, change of entropy, agreement and perplexity ratio, against the unsteered model."""

    name: ClassVar[str] = "divergence"
    title: ClassVar[str] = "how far predictions on neutral texts move from the unsteered model's"
    source: ClassVar[str] = "Hojer et al. 2025, arXiv 2504.19483"
    against_baseline: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, Column]] = {
        "kl": Column("KL divergence", "nats per token", "lower", share=False),
        "entropy_change": Column("change of entropy", "bits per token", share=False),
        "agreement": Column("same top token", "share of tokens", "higher", share=False, neutral=1.0),
        "perplexity_ratio": Column("perplexity ratio", "steered / unsteered", "lower", "log", share=False),
    }

    def score(self, trial: Trial) -> dict[str, Weighted]:
        """Score every neutral text.

        Args:
            trial: whose neutral texts are read. Behind a system prompt of the setup the same answers are predicted; the
                unsteered model reads them without it.

        Returns:
            Means over each text's answer tokens, weighted by their number: ``{"kl": [n], "entropy_change": [n],
            "agreement": [n], "perplexity_ratio": [n]}``.

        Raises:
            DataError: a neutral text has no answer.
        """
        texts, plain = calm_pairs(trial.setup)
        # The unsteered model is at no distance from itself; no pass is needed to say so.
        found = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float32).repeat(len(texts), 1)
        if not trial.is_baseline:
            found = torch.stack(trial.over_answers(texts, _compared, beside=plain))
        counts = token_counts(texts)
        return {name: Weighted(found[:, place], counts) for place, name in enumerate(self.columns)}


def _compared(answer: Answer) -> Tensor:
    """[4] means over the tokens of one answer, on the CPU."""
    return torch.cat([_columns(*part) for part in tiles(answer)], dim=1).mean(dim=1).cpu()


def _columns(steered: Tensor, base: Tensor, targets: Tensor) -> Tensor:
    """[4, t] the columns at every token."""
    own = targets[:, None]
    ratio = (base.gather(-1, own) - steered.gather(-1, own))[:, 0]
    same = steered.max(dim=-1).indices == base.max(dim=-1).indices  # twice as fast as argmax on a CPU
    return torch.stack((token_kl(steered, base), _entropy(steered) - _entropy(base), same.float(), ratio))


def _entropy(logs: Tensor) -> Tensor:
    """[t] entropy in bits of log-probabilities [t, v]."""
    return -expected(logs, logs) / math.log(2)
