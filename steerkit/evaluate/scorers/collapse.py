"""Collapse: whether the activations of a generated text have become all alike.

    collapse(text) = mean over pairs of different tokens i, j of  cos(h_i, h_j)

with `h` the last block's output at the tokens of the generated text, a row's first token excluded. A vector that is too
strong for a model drowns what tells tokens apart: all of them point one way, and the model says one thing for ever, or
fluent nothing, which neither repetition nor perplexity need see. Independent activations have about 0; with a shift in
common of s standard deviations s^2 / (1 + s^2).

Models differ in how alike tokens are by themselves, so the change against the unsteered model's own texts is what
counts. Steered texts are read under the same steering, as the model had them when it wrote.

A text of fewer than two tokens has no pair. Where steering made it so it counts as collapsed, 1.

Gopalani and Hu (2025), "What Happens During the Loss Plateau? Understanding Abrupt Learning in Transformers", arXiv
2506.13688, where hidden states of different positions become parallel while a model in training only repeats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.activations.recording import record_ids
from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.trial import Trial
from steerkit.network.sites import Site

__all__ = ["Collapse", "mean_cosine"]


@dataclass(frozen=True)
class Collapse(Scorer):
    """Mean cosine between the activations of different tokens of each generated text, at the last block's output."""

    name: ClassVar[str] = "collapse"
    title: ClassVar[str] = "how alike the activations of a generated text's tokens are"
    source: ClassVar[str] = "Gopalani and Hu 2025, arXiv 2506.13688"
    columns: ClassVar[Mapping[str, Column]] = {
        "collapse": Column("likeness of tokens", "mean cosine", "lower", share=False, worst=1.0),
    }

    def score(self, trial: Trial) -> dict[str, Tensor]:
        """Score every generated text.

        Args:
            trial: whose texts are read.

        Returns:
            ``{"collapse": [n]}``; nan for a text of fewer than two tokens.

        Raises:
            SiteError: the model has no one stream behind its last block.
        """
        setup = trial.setup
        last = Site(setup.decoder.num_layers - 1)
        found = []
        for asked, text in zip(setup.asked, trial.texts, strict=True):
            if not text.strip():
                found.append(math.nan)
                continue
            shown = setup.render(replace(asked, answer=text))
            with trial.steering([shown.prompt_length]):
                (rows,) = record_ids(setup.model, [shown.ids], [last]).values()
            found.append(mean_cosine(rows[0][max(shown.prompt_length, 1) :]))
        return {"collapse": torch.tensor(found, dtype=torch.float32)}


def mean_cosine(rows: Tensor) -> float:
    """Mean cosine over pairs of different rows.

    Args:
        rows: [t, d] activations of one text.

    Returns:
        From -1 / (t - 1) to 1; nan for fewer than two rows.

    Example:
        >>> import torch
        >>> mean_cosine(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]))  # one pair alike, two at right angles
        0.3333333333333333
    """
    count = len(rows)
    if count < 2:
        return math.nan
    units = torch.nn.functional.normalize(rows.double(), dim=-1)
    # The square of the sum has every pair twice, and each row with itself.
    return float((units.sum(dim=0).square().sum() - units.square().sum()) / (count * (count - 1)))
