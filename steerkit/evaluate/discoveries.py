"""What vectors do that nobody has asked for: their cost, the known vectors they lie along, and what the model says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from steerkit.errors import SteerError
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.scoring import ends, measure
from steerkit.evaluate.setup import Setup
from steerkit.methods._protocols import read_direction
from steerkit.methods._registry import method_of
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Discovery", "Known", "directions_of", "looked_at", "nearest"]


class Known(NamedTuple):
    """A known vector beside another.

    Attributes:
        vector: what it is called.
        site: where both have a direction.
        cosine: of the two directions.
    """

    vector: str
    site: Site
    cosine: float


@dataclass(frozen=True)
class Discovery:
    """What one vector does, at its own strength.

    Attributes:
        name: what it is called.
        change: what it was chosen for, as its method counts it; None where the method says nothing.
        kl: KL divergence from the unsteered model on neutral texts, nats per token, with its 95 % interval.
        nearest: the known vector with the largest cosine, whatever its sign; None where none acts at the same site.
        text: what the steered model answers to the setup's prompt.
    """

    name: str
    change: float | None
    kl: Estimate
    nearest: Known | None
    text: str

    def as_json(self) -> dict[str, Any]:
        """Plain data; an end of the interval that no number bounds is None."""
        low, high = ends(self.kl)
        beside = self.nearest
        return {
            "name": self.name,
            "change": self.change,
            "kl": {"mean": self.kl.mean, "low": low, "high": high},
            "nearest": None
            if beside is None
            else {"vector": beside.vector, "site": str(beside.site), "cosine": beside.cosine},
            "text": self.text,
        }


def looked_at(
    setup: Setup, vectors: Mapping[str, SteeringVector], known: Mapping[str, SteeringVector]
) -> list[Discovery]:
    """Look at what vectors do on neutral texts and on one prompt, each at strength 1; they share passes.

    Args:
        setup: with the neutral texts, and one prompt.
        vectors: name to vector.
        known: name to vector, to lie beside.

    Returns:
        One for each vector, in their order.

    Raises:
        SteerError: a vector is not of the setup's model.
    """
    found = []
    trials = setup.trials([(vector, 1.0) for vector in vectors.values()])
    for (name, vector), trial in zip(vectors.items(), trials, strict=True):
        (text,) = trial.texts
        kl = measure(trial, ["divergence"])["kl"].effect
        found.append(Discovery(name, _change(vector), kl, next(iter(nearest(vector, known)), None), text))
    return found


def nearest(vector: SteeringVector, known: Mapping[str, SteeringVector]) -> list[Known]:
    """Known vectors by the cosine of their directions with a vector's, largest first whatever their signs.

    Args:
        vector: the vector.
        known: name to vector; those without a direction where the vector has one are left out.
    """
    own = directions_of(vector)
    found = [
        Known(name, site, float(torch.cosine_similarity(own[site], direction, dim=0)))
        for name, one in known.items()
        for site, direction in directions_of(one).items()
        if site in own and direction.shape == own[site].shape
    ]
    return sorted(found, key=lambda one: -abs(one.cosine))


def directions_of(vector: SteeringVector) -> dict[Site, torch.Tensor]:
    """The single directions that a vector writes.

    Args:
        vector: the vector.

    Returns:
        [d] float32 by site; nothing where its method is not installed.
    """
    try:
        method = method_of(vector)
        found = {site: read_direction(method, vector.params(site)) for site in vector.sites}
    except SteerError:
        return {}
    return {site: one.float() for site, one in found.items() if one is not None}


def _change(vector: SteeringVector) -> float | None:
    """What a found direction was chosen for, at the end of its search."""
    (found, *_) = [vector.params(site).get("change") for site in vector.sites]
    return None if found is None else float(found[0, -1])
