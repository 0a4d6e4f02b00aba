"""Vectors side by side at the same cost: the strength at which each reaches one KL divergence on neutral texts.

    KL(s)    mean over answer tokens of neutral texts of sum over v of p_base(v) (log p_base(v) - log p_s(v))    nats

The strength is found by bisection; effect and costs are then measured at it, the costs on the texts it was found on, so
that they are equal. Used by the benchmarks that set methods beside each other: `at_kl` finds the strength, `table`
measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.scorers._answers import answer_kl, calm_pairs
from steerkit.evaluate.scoring import measure
from steerkit.evaluate.setup import Setup
from steerkit.methods._registry import method_of
from steerkit.vector.steering_vector import SteeringVector

CLOSE = 0.03
"""A strength is found where its KL divergence is so near the wanted one, in parts of that."""
STEPS, WIDER = 20, 6
"""Bisections, and doublings of the strength before them, at the most."""
COLUMNS = ("preference_margin", "kl", "perplexity_ratio")


class Reached(NamedTuple):
    """A strength and the KL divergence that it costs on the texts it was found on."""

    strength: float
    kl: float


@dataclass(frozen=True)
class Row:
    """One vector at the strength that costs a wanted KL divergence.

    Attributes:
        name: what it is called.
        kl: the wanted KL divergence, nats per token.
        reached: the strength; None where none costs so much (or so little).
        figures: change of the preference margin, KL divergence and perplexity ratio, by `COLUMNS`.
        why: why there is no strength.
    """

    name: str
    kl: float
    reached: Reached | None
    figures: Mapping[str, Estimate]
    why: str = ""

    def cells(self) -> list[str]:
        """The row of a Markdown table: wanted KL, name, strength, and the figures with their intervals."""
        if self.reached is None:
            return [f"{self.kl:g}", self.name, "-", self.why, *["-"] * (len(COLUMNS) - 1)]
        effect, kl, ratio = (self.figures[column] for column in COLUMNS)
        return [
            f"{self.kl:g}",
            self.name,
            f"{self.reached.strength:.3g}",
            f"{effect.mean:+.3f} ({effect.low:+.3f} to {effect.high:+.3f})",
            f"{kl.mean:.3f} ({kl.low:.3f} to {kl.high:.3f})",
            f"{ratio.mean:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        reached = None if self.reached is None else self.reached._asdict()
        figures = {name: figure._asdict() for name, figure in self.figures.items()}
        return {"name": self.name, "kl": self.kl, "reached": reached, "why": self.why, **figures}


HEAD = ["KL wanted", "vector", "strength", "effect", "KL", "perplexity ratio"]


def kl_of(setup: Setup, vector: SteeringVector, strength: float) -> float:
    """What a vector costs at a strength on the neutral texts, nats per token; infinite where logits are not finite.

    Args:
        setup: model, tokenizer and neutral texts.
        vector: the vector, with its own scope.
        strength: in the vector's unit.
    """
    texts, plain = calm_pairs(setup)
    found = setup.trial(vector, strength).over_answers(texts, answer_kl, beside=plain)
    total = sum(float(kl.sum()) for kl in found) / sum(map(len, found))
    return total if math.isfinite(total) else math.inf


def at_kl(setup: Setup, vector: SteeringVector, kl: float, *, start: float | None = None) -> Reached | str:
    """The strength on the behaviour's side of neutral at which a vector costs a KL divergence, by bisection.

    Costs need not rise all the way from the weakest strength on (a coordinate that is set has no neutral strength), so
    the strength is looked for upwards from the first one that costs less than is wanted: the weakest that reaches it.

    Args:
        setup: model, tokenizer and the neutral texts that tell the cost.
        vector: the vector.
        kl: nats per token.
        start: where to begin; None takes the first strength of the method's ladder.

    Returns:
        The strength, or in words why there is none.
    """
    ladder = method_of(vector).ladder
    first = ladder[0] if start is None else start
    cost: Callable[[float], float] = lambda strength: kl_of(setup, vector, strength)  # noqa: E731
    low = Reached(first, cost(first))
    if not low.kl < kl:
        if method_of(vector).neutral != 0.0:  # nothing below it need cost less: look above, where it may
            cheaper = (Reached(one, found) for one in ladder[1:] if (found := cost(one)) < kl)
            below = next(cheaper, None)
            if below is None:
                return f"every strength of the ladder costs more, {first:g} costs {low.kl:.3g}"
            low = below
        else:
            return _between(cost, Reached(0.0, 0.0), low, kl)
    for _ in range(WIDER):
        high = Reached(2 * low.strength, cost(2 * low.strength))
        if high.kl >= kl:
            return _between(cost, low, high, kl)
        low = high
    return f"none costs so much, {low.strength:g} costs {low.kl:.3g}"


def _between(cost: Callable[[float], float], low: Reached, high: Reached, kl: float) -> Reached | str:
    """The strength between one that costs less and one that costs more."""
    for _ in range(STEPS):
        # KL grows about with the square of the strength, so a line through square roots is nearly right; the middle is
        # taken where one end costs no number, or the line would creep along an end.
        share = 0.5
        if math.isfinite(high.kl):
            share = (math.sqrt(kl) - math.sqrt(low.kl)) / (math.sqrt(high.kl) - math.sqrt(low.kl))
        strength = low.strength + min(max(share, 0.1), 0.9) * (high.strength - low.strength)
        found = Reached(strength, cost(strength))
        if abs(found.kl - kl) <= CLOSE * kl:
            return found
        low, high = (found, high) if found.kl < kl else (low, found)
    return f"the cost jumps from {low.kl:.3g} to {high.kl:.3g} at {high.strength:.3g}"


def measured(setup: Setup, name: str, vector: SteeringVector, kl: float) -> Row:
    """One vector at the strength that costs a KL divergence.

    Args:
        setup: model, tokenizer, held-out pairs and neutral texts.
        name: what to call the vector.
        vector: the vector.
        kl: nats per token.
    """
    plain = replace(vector, calibration={}, suggested_strength=None)  # what it is suggested at says nothing here
    found = at_kl(setup, plain, kl)
    if isinstance(found, str):
        return Row(name, kl, None, {}, found)
    scores = measure(setup.trial(plain, found.strength), ["preference_margin", "divergence"])
    return Row(name, kl, found, {column: scores[column].effect for column in COLUMNS})


def table(setup: Setup, vectors: Mapping[str, SteeringVector], kls: Sequence[float]) -> list[Row]:
    """Every vector at the strengths that cost each of some KL divergences.

    Args:
        setup: model, tokenizer, held-out pairs and neutral texts.
        vectors: by name.
        kls: nats per token.
    """
    return [measured(setup, name, vector, kl) for kl in kls for name, vector in vectors.items()]
