"""Evidence: everything a report shows of one vector on one model, as plain results, and what they amount to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from steerkit.evaluate.curve import Curve
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.scoring import Measured
from steerkit.monitor.token_heat import TokenScores
from steerkit.report.plots.scatter import Spot

__all__ = [
    "Evidence",
    "EvidencePlan",
    "Heat",
    "Projections",
    "Separation",
    "Texts",
    "is_clear",
    "mean",
    "plain",
    "signed",
    "span",
]


@dataclass(frozen=True)
class EvidencePlan:
    """How much is measured.

    Attributes:
        strengths: of the dose-response; the suggested and the neutral one are added. None takes them from both sides
            of neutral, as far as the suggested strength and half of it.
        questions: answered before and after.
        controls: random directions, and draws of fits on shuffled labels.
        control_strengths: where random directions are measured; None takes the suggested strength and the far end on
            the other side of neutral.
        shuffled: fits on shuffled labels whose effect is measured at the suggested strength.
        texts: prompts answered for repetition and length.
        neutral: neutral texts for KL divergence and perplexity.
        new_tokens: the longest answer.
        seed: fixes controls and intervals.
        batch_size: rows per pass.
    """

    strengths: Sequence[float] | None = None
    questions: Sequence[str] = ()
    controls: int = 5
    control_strengths: Sequence[float] | None = None
    shuffled: int = 3
    texts: int = 6
    neutral: int = 12
    new_tokens: int = 40
    seed: int = 0
    batch_size: int = 16


class Separation(NamedTuple):
    """How well the method's direction at one block separates held-out items.

    Attributes:
        block: counted from 0.
        auc: share of (positive, negative) couples in the right order, ties counted half.
        cohens_d: distance of the means in pooled standard deviations.
    """

    block: int
    auc: float
    cohens_d: float


class Projections(NamedTuple):
    """Held-out items along the vector's own direction at one site, in activation units.

    Attributes:
        site: where they were read.
        positive: one number per item.
        negative: one number per item.
        auc: share of (positive, negative) couples in the right order, ties counted half.
        cohens_d: distance of the means in pooled standard deviations.
    """

    site: str
    positive: tuple[float, ...]
    negative: tuple[float, ...]
    auc: float
    cohens_d: float

    @property
    def middle(self) -> float:
        """Half-way between the means of the two sides."""
        return (mean(self.positive) + mean(self.negative)) / 2


class Texts(NamedTuple):
    """One question answered three times, greedy.

    Attributes:
        prompt: the question.
        lower: answered at the suggested strength mirrored at the neutral one.
        baseline: answered without steering.
        upper: answered at the suggested strength.
    """

    prompt: str
    lower: str
    baseline: str
    upper: str


@dataclass(frozen=True, eq=False)
class Heat:
    """One prompt answered without and with steering, token by token, both read by the unsteered model.

    Attributes:
        baseline: the prompt with the unsteered answer.
        steered: the prompt with the steered answer.
        middle: what counts as zero.
        shift: how much further along the direction the steered answer's tokens lie under steering, on average.
    """

    baseline: TokenScores
    steered: TokenScores
    middle: float
    shift: float


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
        curve: dose-response and costs; its effect is the KL divergence where the items have no two answers.
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
    plan: EvidencePlan = EvidencePlan()
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
        return _verdict(self) if self.has_effect else ("No effect was measured.", "")

    @property
    def spots(self) -> list[Spot]:
        """Effect and KL divergence of every point known: the curve's, and those of the calibration in the file."""
        return _spots(self) if self.has_effect else []

    def as_json(self) -> dict[str, Any]:
        """Plain data; numbers that JSON does not have are None."""
        heat = self.heat
        found: dict[str, Any] = plain(
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


def _verdict(evidence: Evidence) -> tuple[str, str]:
    """The judgement in a few words, and the figures it rests on."""
    measured = evidence.suggested[evidence.curve.effect]
    column, change = measured.column, measured.effect
    sign = 1 if evidence.strength >= (evidence.neutral or 0.0) else -1
    certain = sign * (change.low if sign > 0 else change.high) > 0
    baseline = measured.estimate.mean - change.mean
    moved = "rises" if change.mean > 0 else "falls"
    said = (
        f"At strength {evidence.strength:g} the {column.title} on {measured.items} held-out items {moved} by "
        f"{abs(change.mean):.3g} {column.unit} against the unsteered model (95 % interval of the change "
        f"{span(change)}), from {baseline:.3g} to {measured.estimate.mean:.3g}."
    )
    clear = True
    if evidence.randoms:
        most = max(evidence.randoms, key=lambda one: sign * one)
        clear = is_clear(measured, evidence.randoms, sign)
        said += (
            f" The largest of {len(evidence.randoms)} random directions of the same norm changes it by "
            f"{signed(most - baseline)}: {'the effect is clear of it' if clear else 'the effect is not clear of it'}."
        )
    if not certain:
        return "No effect shown: the interval of the change includes zero or lies on the other side.", said
    if not clear:
        return "In doubt: a random direction of the same norm may do as much.", said
    beside = " and of every random direction" if evidence.randoms else "; no random direction was measured"
    return f"It steers: the effect is clear of zero{beside}.", said


def is_clear(measured: Measured, controls: Sequence[float], sign: int) -> bool:
    """Whether the change that steering made lies beyond that of every control, interval included.

    Changes on the same items are compared: what items differ in is no doubt about what steering changes in them.

    Args:
        measured: the effect.
        controls: mean effects of vectors with nothing learned in them, on the same items.
        sign: 1 where more is meant, -1 where less is.
    """
    change = measured.effect
    changes = [control - measured.estimate.mean + change.mean for control in controls]
    return change.low > max(changes) if sign > 0 else change.high < min(changes)


def _spots(evidence: Evidence) -> list[Spot]:
    spots = []
    for strength, point in zip(evidence.curve.strengths, evidence.curve.points, strict=True):
        measured = point[evidence.curve.effect]
        change = 0.0 if measured.change is None else measured.change.mean
        spots.append(Spot(f"{strength:+g}", point["kl"].estimate.mean, change, 0, chosen=strength == evidence.strength))
    for row in (evidence.calibration or {}).get("validation", ()):
        effect, kl = row["scores"].get(evidence.curve.effect), row["scores"].get("kl")
        if row["strength"] is None or effect is None or kl is None or "change" not in effect:
            continue
        label = f"{'+'.join(map(str, row['layers']))} at {row['strength']:g}"
        spots.append(Spot(label, kl["mean"], effect["change"], 1))
    return spots


def mean(values: Sequence[float]) -> float:
    """The mean of some numbers.

    Args:
        values: at least one.
    """
    return sum(values) / len(values)


def span(found: Estimate) -> str:
    """An interval for people.

    Args:
        found: the estimate.
    """
    return f"{found.low:.3g} to {found.high:.3g}"


def signed(value: float) -> str:
    """A change for people, with its sign.

    Args:
        value: the change.
    """
    return f"{value:+.3g}"


def plain(value: Any) -> Any:
    """Plain data with None in the place of numbers that JSON does not have.

    Args:
        value: mappings, lists, tuples and what JSON holds.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
