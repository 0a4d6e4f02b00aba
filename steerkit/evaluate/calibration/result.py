"""What a calibration found, tried and confirmed, as one record that the vector file keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from steerkit.evaluate.calibration.budget import Budget, Search
from steerkit.evaluate.curve import Curve
from steerkit.evaluate.scoring import Measured
from steerkit.evaluate.sweeps import Point
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        works: whether the confirmed effect is clear of every control inside the budget.
        verdict: the same in one line, with the reason.
        has_effect: whether it is clear of every control, whatever it costs.
        vector: fitted on all training items at the chosen layers, with the suggestion and both curves in it; None
            where nothing was inside the budget.
        layers: where it acts.
        strength: the suggestion.
        effect: the column that shows the effect.
        budget: what it may cost.
        points: everything tried on the validation split.
        chosen: figures of the chosen point on the validation split.
        confirmed: the same on the held-out items, and other neutral texts.
        curve: effect by strength on the held-out items, with random directions.
        shuffled: effects of fits on shuffled labels, rescaled to the same norm, at the suggested strength.
        search: how it was looked for.
        refits: how stable the direction is on other items, as plain data.
        skipped: candidates at which the method cannot be fitted, with the reason.
        variants: what was chosen with each of several settings of the method, as plain data.
        suggests: whether the file suggests the strength: there is an effect, or too few items say whether there is one.
        promised: what slopes promise of the candidates, where these were ranked by them, as plain data.
    """

    works: bool
    verdict: str
    vector: SteeringVector | None
    layers: tuple[int, ...]
    strength: float | None
    effect: str
    budget: Budget
    points: tuple[Point, ...]
    has_effect: bool = False
    chosen: dict[str, Measured] = field(default_factory=dict)
    confirmed: dict[str, Measured] = field(default_factory=dict)
    curve: Curve | None = None
    shuffled: tuple[float, ...] = ()
    search: Search = field(default_factory=Search)
    refits: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    variants: tuple[Mapping[str, Any], ...] = ()
    promised: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    suggests: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain data: what the vector file keeps of it."""
        return {
            "works": self.works,
            "verdict": self.verdict,
            "layers": list(self.layers),
            "strength": self.strength,
            "effect": self.effect,
            "budget": asdict(self.budget),
            "validation": [point.as_row() for point in self.points],
            "confirmation": {name: one.as_row() for name, one in self.confirmed.items()},
            "curve": None if self.curve is None else self.curve.as_rows(),
            "shuffled": list(self.shuffled),
            "search": asdict(self.search),
            "direction": dict(self.refits),
            "skipped": dict(self.skipped),
            **({"variants": [dict(one) for one in self.variants]} if self.variants else {}),
            **({"promised": {name: dict(one) for name, one in self.promised.items()}} if self.promised else {}),
        }
