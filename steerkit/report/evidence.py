"""Evidence: everything a report shows of one vector on one model, as plain results, and what they amount to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from steerkit._support.json_values import jsonable
from steerkit.evaluate.blocks import Separation
from steerkit.evaluate.curve import Curve
from steerkit.evaluate.scoring import Measured
from steerkit.report.evidence_parts import EvidencePlan, Heat, Projections, Texts
from steerkit.report.plots.scatter import Spot
from steerkit.report.verdict import spots_of, verdict_of

__all__ = ["Evidence"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was measured of one vector on one model.

    Attributes:
        name: of the vector.
        title: of its method.
        vector: the facts of its file.
        model: what the model is called, how deep and how wide it is.
        strength: the suggested one, else 1.
        neutral: the strength that changes nothing; None where the method has none.
        items: held-out items.
        curve: effect and costs by strength; its effect is the KL divergence where the items have no two answers.
        warnings: what to know before trusting the figures.
        missing: section to the reason why it is left out.
        layers: separation of the method's direction at every block.
        projections: held-out items along the vector's own direction.
        calibration: what the vector's file says of its calibration.
        refits: fits on rearranged items.
        shuffled: effects of fits on shuffled labels, rescaled to the same norm, at the suggested strength.
        heat: one prompt token by token.
        texts: before and after.
        digests: of everything that the figures depend on.
        versions: of what computed.
        plan: how much was measured.
        command: that repeats it.
    """

    name: str
    title: str
    vector: Mapping[str, Any]
    model: Mapping[str, Any]
    strength: float
    neutral: float | None
    items: int
    curve: Curve
    warnings: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[Separation, ...] = ()
    projections: Projections | None = None
    calibration: Mapping[str, Any] | None = None
    refits: Mapping[str, Any] | None = None
    shuffled: tuple[float, ...] = ()
    heat: Heat | None = None
    texts: tuple[Texts, ...] = ()
    digests: Mapping[str, str | None] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    plan: EvidencePlan = field(default_factory=EvidencePlan)
    command: str = ""

    @property
    def has_effect(self) -> bool:
        """Whether an effect could be measured beside the costs."""
        return "effect" not in self.missing

    @property
    def suggested(self) -> Mapping[str, Measured]:
        """Every figure at the suggested strength."""
        return self.curve.points[self.curve.strengths.index(self.strength)]

    @property
    def randoms(self) -> list[float]:
        """Effects of the random directions at the suggested strength."""
        return [control[self.strength] for control in self.curve.controls if self.strength in control]

    @property
    def verdict(self) -> tuple[str, str]:
        """The judgement in a few words, and the figures it rests on."""
        return verdict_of(self) if self.has_effect else ("No effect was measured.", "")

    @property
    def spots(self) -> list[Spot]:
        """Effect and KL divergence of every point known: the curve's, and those of the calibration in the file."""
        return spots_of(self) if self.has_effect else []

    def as_json(self) -> dict[str, Any]:
        """Plain data; numbers that JSON does not have are None."""
        heat = self.heat
        found: dict[str, Any] = jsonable(
            {
                "name": self.name,
                "title": self.title,
                "vector": self.vector,
                "model": self.model,
                "strength": self.strength,
                "neutral": self.neutral,
                "verdict": " ".join(self.verdict).strip(),
                "warnings": self.warnings,
                "missing": self.missing,
                "layers": [one._asdict() for one in self.layers],
                "projections": None if self.projections is None else self.projections._asdict(),
                "effect": self.curve.effect if self.has_effect else None,
                "items": self.items,
                "curve": self.curve.as_rows(),
                "pareto": [spot._asdict() for spot in self.spots],
                "controls": {"refits": self.refits, "shuffled": self.shuffled, "random": self.randoms},
                "heat": None
                if heat is None
                else {
                    "site": str(heat.baseline.site),
                    "middle": heat.middle,
                    "shift": heat.shift,
                    "baseline": list(zip(heat.baseline.tokens, heat.baseline.values.tolist(), strict=True)),
                    "steered": list(zip(heat.steered.tokens, heat.steered.values.tolist(), strict=True)),
                },
                "texts": [one._asdict() for one in self.texts],
                "digests": self.digests,
                "versions": self.versions,
                "plan": asdict(self.plan),
                "command": self.command,
            }
        )
        return found
