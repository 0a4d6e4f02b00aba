"""Candidates ranked without steering: what the slopes of their effects and costs promise at the budget.

    effect(s) = effect(0) + a s,   KL(s) = c s^2 / 2     so at KL = max_kl the effect is about  a sqrt(2 max_kl / c)

Both hold for small strengths. Effects bend before the budget ends, and not everywhere alike; `docs/results/attribution.md`
has how far that
misleads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerkit.evaluate.attribution.costs import curvature, drawn_slopes, strength_within
from steerkit.evaluate.attribution.slopes import attribute_all
from steerkit.evaluate.calibration.problem import Problem
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Promise", "Promises"]

_DRAWS = 2  # the same for all candidates, whose ranks need less than the figures themselves


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
        problem: what is calibrated.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem, self._setup = problem, problem.few[-1]
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}

    def of(self, candidates: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Promise]:
        """What each candidate promises, from one forward pass and some backward ones for all of them.

        Args:
            candidates: sets of layers at which the method can be fitted.

        Raises:
            DataError: the method's vectors have no slope, or no gradient goes through the scorer of the effect.
            ModelError: none goes through the model.
        """
        vectors = {layers: self._problem.fits.at(layers) for layers in candidates}
        self._ask([one for one in vectors.values() if any(key not in self._known for key in _keys(one))])
        return {layers: self._promise(vector) for layers, vector in vectors.items()}

    def _ask(self, vectors: list[SteeringVector]) -> None:
        """Find the slopes of the effect, and of drawn answers, of vectors at each of their sites."""
        if not vectors:
            return
        problem = self._problem
        effects = attribute_all(self._setup, vectors, problem.scorer, in_parts=False)
        drawn = drawn_slopes(self._setup, vectors, draws=_DRAWS, seed=problem.search.seed)
        for vector, effect, cost in zip(vectors, effects, drawn, strict=True):
            slopes = zip(effect.sites.values(), cost.values(), strict=True)
            self._known |= {key: (own.items, texts) for key, (own, texts) in zip(_keys(vector), slopes, strict=True)}

    def _promise(self, vector: SteeringVector) -> Promise:
        problem, (items, drawn) = self._problem, zip(*(self._known[key] for key in _keys(vector)), strict=True)
        towards = 1.0 if problem.ladder[0] > (problem.kind.neutral or 0.0) else -1.0
        if problem.scorer.columns[problem.effect].better == "lower":
            towards = -towards
        slope = towards * float(torch.stack(items).sum(dim=0).double().mean())
        curved = curvature(self._setup, drawn)
        strength = strength_within(curved, problem.budget.max_kl)
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
