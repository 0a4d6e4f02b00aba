"""How fast a vector begins to cost: the curvature of its KL divergence in the strength, from backward passes alone.

    KL(s) = c * s^2 / 2 + O(s^3)        nats per token on neutral texts
    c     = mean over tokens of  E over y ~ p of  (d log p(y) / d s)^2       the Fisher information along the vector

For one text all tokens are asked at once: with y drawn at every position, the expected square of the derivative of the
sum of log p(y) is the sum of the positions' own, because scores have mean 0 and are drawn independently. So a few draws
give the cost of every vector, and of any sites together, without steering once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerkit.evaluate.attribution.gradients import slopes_of_texts
from steerkit.evaluate.scorers._answers import calm_texts, token_counts
from steerkit.network.sites import Site

if TYPE_CHECKING:
    from steerkit.evaluate.setup import Setup
    from steerkit.evaluate.trial import Answer
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["curvature", "drawn_slopes", "kl_curvatures", "strength_within"]

DRAWS = 8


def kl_curvatures(setup: Setup, vectors: Sequence[SteeringVector], *, draws: int = DRAWS, seed: int = 0) -> list[float]:
    """The curvature of each vector's KL divergence where it does nothing.

    Args:
        setup: with the neutral texts.
        vectors: fitted on the same rendering of prompts and answers.
        draws: backward passes over each text; the error of a curvature falls with the root of texts times draws.
        seed: fixes the draws.

    Returns:
        For each vector c, nats per token and squared unit of strength: `KL = c * s^2 / 2` for small s.

    Raises:
        DataError: a vector has no slope, or a neutral text has no answer.
        ModelError: no gradient goes through the model.
    """
    found = drawn_slopes(setup, vectors, draws=draws, seed=seed)
    return [curvature(setup, list(sites.values())) for sites in found]


def drawn_slopes(
    setup: Setup, vectors: Sequence[SteeringVector], *, draws: int = DRAWS, seed: int = 0
) -> list[dict[Site, Tensor]]:
    """Slopes of the log-probability of answers that the model itself draws for the neutral texts, token by token.

    Args:
        setup: see `kl_curvatures`.
        vectors: see `kl_curvatures`.
        draws: see `kl_curvatures`.
        seed: see `kl_curvatures`.

    Returns:
        For each vector [draws, n] by site.

    Raises:
        DataError: see `kl_curvatures`.
        ModelError: see `kl_curvatures`.
    """
    texts = calm_texts(setup)

    def drawn(answer: Answer) -> Tensor:
        """[draws] log-probabilities of as many answers, each token drawn from what the model predicts there."""
        logs = torch.log_softmax(answer.logits, dim=-1)
        generator = torch.Generator().manual_seed(seed * len(texts) + answer.row)
        chances = logs.detach().exp().cpu()
        picked = torch.multinomial(chances, draws, replacement=True, generator=generator).to(logs.device)  # [t, k]
        return logs.gather(-1, picked).sum(dim=0)

    _, alongs = slopes_of_texts(setup, texts, drawn, vectors)
    return [{site: one.own for site, one in found.items()} for found in alongs]


def curvature(setup: Setup, drawn: Sequence[Tensor]) -> float:
    """The curvature of the KL divergence along some sites together.

    Args:
        setup: with the neutral texts.
        drawn: [k, n] of each site, as `drawn_slopes` gives them.
    """
    together = torch.stack(list(drawn)).double().sum(dim=0)
    return float(together.square().mean(dim=0).sum()) / float(token_counts(calm_texts(setup)).sum())


def strength_within(curvature: float, max_kl: float) -> float:
    """The strength at which a vector's KL divergence would reach a budget if it went on as it begins.

    Args:
        curvature: see `kl_curvatures`.
        max_kl: nats per token.

    Returns:
        Its distance from the neutral strength; infinite where nothing is changed.
    """
    return math.sqrt(2 * max_kl / curvature) if curvature > 0 else math.inf
