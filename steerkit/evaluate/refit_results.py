"""What refitting on rearranged items gave: vectors of shuffled labels, cosines of halves, spread of the bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerkit.evaluate.intervals import Estimate
from steerkit.methods._base import Method
from steerkit.methods._registry import method_of
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["TAIL", "Refits", "Spread", "cosine", "direction_at", "estimate_of"]

SAME_AXIS = 0.9
TAIL = 0.025
"""Share of the draws beyond either end of an interval."""


class Spread(NamedTuple):
    """How far a direction moves when the items are drawn anew.

    Attributes:
        cosine: median cosine to the vector's own direction.
        cosine_low: 2.5 % quantile of that.
        length: mean length of the directions, with the 2.5 % and 97.5 % quantiles, in activation units.
    """

    cosine: float
    cosine_low: float
    length: Estimate


@dataclass(frozen=True, eq=False)
class Refits:
    """What a method makes of rearranged items.

    Attributes:
        vector: the vector the refits are held against.
        reason: why there are none; None where there are.
        items: items of the larger side.
        shuffled: vectors fitted on shuffled labels, as long as they came out.
        split_half: per site the cosine between directions of two halves: mean, 2.5 % and 97.5 % quantile over draws.
        bootstrap: per site how far direction and length move.
        reproduced: per site the cosine between the vector's direction and that of a refit on the rows as they are. It
            is 1 where model, precision and data are those the vector was fitted on.
        skipped: per kind of refit the draws whose sides did not differ, which have no direction.
    """

    vector: SteeringVector
    reason: str | None = None
    items: int = 0
    shuffled: tuple[SteeringVector, ...] = ()
    split_half: Mapping[Site, Estimate] = field(default_factory=dict)
    bootstrap: Mapping[Site, Spread] = field(default_factory=dict)
    reproduced: Mapping[Site, float] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)

    def matched(self) -> tuple[SteeringVector, ...]:
        """Rescale the vectors of shuffled labels to the length of the vector's own directions, site by site.

        So both comparisons can be made: as fitted, and at equal size. Tensors that are no directions stay as fitted.
        Those of `same_axis` are left out.
        """
        return tuple(_as_long_as(self.vector, other) for other in self.shuffled if not self._is_same_axis(other))

    @property
    def same_axis(self) -> int:
        """How many fits on shuffled labels found the vector's own axis again, and so are no controls.

        A method that looks for the axis of largest difference (RepE) needs labels for its sign only: swapping the two
        sides of a pair changes nothing but the sign of their difference.
        """
        return sum(map(self._is_same_axis, self.shuffled))

    def _is_same_axis(self, other: SteeringVector) -> bool:
        """Whether a refit lies along the same axis at every site, either way round."""
        method = method_of(self.vector)
        found = [
            (direction_at(method, self.vector, site), direction_at(method, other, site)) for site in self.vector.sites
        ]
        cosines = [cosine(again, own) for own, again in found if own is not None and again is not None]
        return bool(cosines) and min(map(abs, cosines)) > SAME_AXIS

    def as_json(self) -> dict[str, Any]:
        """Plain data; of each vector of shuffled labels its relative length and its cosine to the vector."""
        if self.reason is not None:
            return {"reason": self.reason}
        method = method_of(self.vector)
        sites: dict[str, dict[str, Any]] = {}
        for site in self.vector.reads:
            own = direction_at(method, self.vector, site)
            if own is None:
                continue
            others = [found for other in self.shuffled if (found := direction_at(method, other, site)) is not None]
            length = float(own.norm())
            entry: dict[str, Any] = {
                "length": length,
                "reproduced": self.reproduced.get(site),
                "shuffled": [
                    {"relative_length": float(other.norm()) / length, "cosine": cosine(other, own)}
                    for other in others
                    if length > 0
                ],
            }
            if site in self.split_half:
                entry["split_half"] = self.split_half[site]._asdict()
            if site in self.bootstrap:
                spread = self.bootstrap[site]
                entry["bootstrap"] = {**spread._asdict(), "length": spread.length._asdict()}
            sites[str(site)] = entry
        return {
            "items": self.items,
            "sites": sites,
            "skipped": dict(self.skipped),
            "shuffled_on_the_same_axis": self.same_axis,
        }


def direction_at(method: Method, vector: SteeringVector, site: Site) -> Tensor | None:
    """Find a vector's direction at a site.

    Args:
        method: of the vector.
        vector: the vector.
        site: where.

    Returns:
        [d] float64; None where there is no single direction.
    """
    direction = method.direction(vector.params(site))
    return None if direction is None else direction.double()


def cosine(one: Tensor, other: Tensor) -> float:
    """Cosine between two directions; nan where one has no length.

    Args:
        one: [d] float64.
        other: [d] float64.
    """
    return float(torch.dot(one, other) / (one.norm() * other.norm()))


def estimate_of(values: list[float]) -> Estimate:
    """Mean and the quantiles that hold 95 % of the draws.

    Args:
        values: one per draw.
    """
    drawn = torch.tensor(values, dtype=torch.double)
    return Estimate(float(drawn.mean()), float(drawn.quantile(TAIL)), float(drawn.quantile(1 - TAIL)))


def _as_long_as(vector: SteeringVector, other: SteeringVector) -> SteeringVector:
    """A vector whose directions have the lengths of another's, row by row."""
    tensors = dict(other.tensors)
    for name, tensor in tensors.items():
        wanted = vector.tensors.get(name)
        if wanted is None or wanted.shape != tensor.shape or name.rpartition("/")[2] != "direction":
            continue
        lengths = [torch.linalg.vector_norm(one.double(), dim=-1, keepdim=True) for one in (wanted, tensor)]
        factor = torch.where(lengths[1] > 0, lengths[0] / lengths[1], 0.0)
        tensors[name] = (tensor.double() * factor).to(tensor.dtype)
    return replace(other, tensors=tensors)
