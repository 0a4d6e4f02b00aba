"""Candidates ranked without steering: what the slopes of their effects and costs promise at the budget.

    effect(s) = effect(0) + a s,   KL(s) = c s^2 / 2     so at KL = max_kl the effect is about  a sqrt(2 max_kl / c)

Both hold for small strengths. Effects bend before the budget ends, and not everywhere alike, so what comes near the
best climbs too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steerkit.evaluate.attribution.costs import curvature, drawn_slopes, strength_within
from steerkit.evaluate.attribution.slopes import attribute_all, differentiable
from steerkit.evaluate.fits import Fits
from steerkit.evaluate.scorers._base import Scorer
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.evaluate.setup import Setup

__all__ = ["Promise", "Promises"]

_TEXT_DRAWS = 48  # drawn answers in all: a curvature is then known to about a fifth, a promise to a tenth


class Promise(NamedTuple):
    """What a candidate promises.

    Attributes:
        slope: of its effect in the strength, counted so that more is better, on the ladder's side of neutral.
        curvature: of its KL divergence, nats per token and squared unit of strength.
        strength: at which that reaches the budget, as its distance from the neutral one.
        effect: there.
    """

    slope: float
    curvature: float
    strength: float
    effect: float

    def as_row(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


class Promises:
    """Finds what candidates promise; what is known of a site is not asked again.

    Args:
        setup: the items of the effect, and the neutral texts of the cost.
        fits: the method, and what it is fitted on.
        scorer: shows the effect; gradients have to go through it.
        max_kl: the budget, nats per token.
        is_above: whether strengths above the neutral one are meant, or those below.
        seed: fixes what is drawn.

    Raises:
        DataError: no gradient goes through the scorer.
    """

    def __init__(
        self, setup: Setup, fits: Fits, scorer: Scorer, *, max_kl: float, is_above: bool = True, seed: int = 0
    ) -> None:
        differentiable(scorer)
        self._setup, self._fits, self._scorer, self._max_kl, self._seed = setup, fits, scorer, max_kl, seed
        lower = next(iter(scorer.columns.values())).better == "lower"
        self._towards = 1.0 if is_above != lower else -1.0
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}

    def of(self, candidates: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Promise]:
        """What each candidate promises, from one forward pass and some backward ones for all of them.

        Args:
            candidates: sets of layers at which the method can be fitted.

        Returns:
            By candidate, those that promise most first.

        Raises:
            DataError: the method's vectors have no slope.
            ModelError: no gradient goes through the model.
        """
        vectors = {layers: self._fits.at(layers) for layers in candidates}
        self._ask([one for one in vectors.values() if any(key not in self._known for key in _keys(one))])
        found = {layers: self._promise(vector) for layers, vector in vectors.items()}
        return dict(sorted(found.items(), key=lambda one: -one[1].effect))

    def _ask(self, vectors: list[SteeringVector]) -> None:
        """Find the slopes of the effect, and of drawn answers, of vectors at each of their sites."""
        if not vectors:
            return
        effects = attribute_all(self._setup, vectors, self._scorer, in_parts=False)
        draws = max(2, math.ceil(_TEXT_DRAWS / len(self._setup.calm)))
        drawn = drawn_slopes(self._setup, vectors, draws=draws, seed=self._seed)
        for vector, effect, cost in zip(vectors, effects, drawn, strict=True):
            slopes = zip(effect.sites.values(), cost.values(), strict=True)
            self._known |= {key: (own.items, texts) for key, (own, texts) in zip(_keys(vector), slopes, strict=True)}

    def _promise(self, vector: SteeringVector) -> Promise:
        items, drawn = zip(*(self._known[key] for key in _keys(vector)), strict=True)
        slope = self._towards * float(torch.stack(items).sum(dim=0).double().mean())
        curved = curvature(self._setup, drawn)
        strength = strength_within(curved, self._max_kl)
        return Promise(slope, curved, strength, slope * strength if math.isfinite(strength) else 0.0)


def _keys(vector: SteeringVector) -> list[tuple[Site, str]]:
    """Each site with what identifies the tensors there: vectors fitted at several layers share those of single ones."""
    found = []
    for site in vector.sites:
        digest = hashlib.sha256()
        for name, tensor in sorted(vector.params(site).items()):
            digest.update(name.encode() + tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        found.append((site, digest.hexdigest()))
    return found
