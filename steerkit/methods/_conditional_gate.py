"""The gate of conditional steering: scores of named conditions, met or not, and a rule over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from steerkit.errors import FitError, VectorMismatchError
from steerkit.maths.predicates import P, Predicate
from steerkit.methods._gate import Decision, Gate
from steerkit.methods._thresholds import lies_above, score
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["PARTS", "ConditionsGate"]

PARTS = ("condition", "threshold", "above", "layer")
"""The shared tensors of a condition."""


class ConditionsGate(Gate):
    """Opens where the prompt meets the rule over the conditions of a file.

    Args:
        vector: the vector, with the conditions in its shared tensors.
        names: of the conditions, in their order.
        kind: of their scores, see `steerkit.methods._thresholds.score`.
        rule: what opens the gate.

    Raises:
        VectorMismatchError: the vector lacks a condition, or was read in a way that no gate can.
    """

    def __init__(
        self, vector: SteeringVector, names: Sequence[str], kind: Literal["cosine", "cast"], rule: Predicate
    ) -> None:
        super().__init__(vector.reads, vector.readout)
        tensors = vector.tensors
        self._names, self._kind, self._rule = tuple(names), kind, rule
        shapes = {name: tuple(tensors[f"shared/{name}"].shape) if f"shared/{name}" in tensors else () for name in PARTS}
        count = len(self._names)
        if any(shape[:1] != (count,) for shape in shapes.values()) or len(shapes["condition"]) != 2:
            raise VectorMismatchError(f"conditional: the vector lacks a condition ({count} named, {shapes} found)")
        self._conditions, self._thresholds = tensors["shared/condition"], tensors["shared/threshold"].tolist()
        self._above = tensors["shared/above"].tolist()
        layers = tensors["shared/layer"].tolist()
        self._sites = [next((site for site in vector.reads if site.layer == layer), None) for layer in layers]
        if None in self._sites:
            raise VectorMismatchError(f"conditional: a condition is read at a layer that is none of {vector.reads}")

    def scores(self, found: Mapping[Site, Tensor]) -> dict[str, Tensor]:
        """Each condition's score [b]."""
        return {
            name: score(found[site], condition, self._kind)
            for name, site, condition in zip(self._names, self._sites, self._conditions, strict=True)
            if site is not None
        }

    def opening(self, found: Mapping[Site, Tensor]) -> Tensor:
        """The score of the one condition, turned round where it is met below its threshold.

        Args:
            found: per read site [b, d] float32.

        Raises:
            FitError: several conditions open the gate, or one that is denied, so no one number does.
        """
        if len(self._names) > 1 or self._rule != P(self._names[0]):
            raise FitError(
                f"conditional: the rule {self._rule} has no one threshold; calibrate the vectors of its conditions"
            )
        scores = self.scores(found)[self._names[0]].double()
        return scores if self._above[0] else -scores

    def met(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whether each condition is met, [b]."""
        met = {}
        for name, threshold, above in zip(self._names, self._thresholds, self._above, strict=True):
            larger = lies_above(scores[name], threshold)
            met[name] = larger if above else ~larger
        return met

    def decide(self, found: Mapping[Site, Tensor]) -> Decision:
        """Open where the rule is met.

        Args:
            found: per read site [b, d] float32.
        """
        return Decision(self._rule(self.met(self.scores(found))))

    def explain(self, found: Mapping[Site, Tensor], strength: float) -> list[dict[str, Any]]:
        """Scores, thresholds and decision, per row.

        Args:
            found: per read site [b, d] float32.
            strength: at which it would steer.
        """
        scores = self.scores(found)
        met, flags = self.met(scores), self.decide(found).is_open.tolist()
        return [
            {
                "open": flag,
                "gain": strength if flag else 0.0,
                "rule": str(self._rule),
                "conditions": {
                    name: {
                        "score": float(scores[name][row]),
                        "compare": "above" if self._above[number] else "below",
                        "threshold": self._thresholds[number],
                        "met": bool(met[name][row]),
                    }
                    for number, name in enumerate(self._names)
                },
            }
            for row, flag in enumerate(flags)
        ]
