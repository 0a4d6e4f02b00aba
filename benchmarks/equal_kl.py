"""Vectors side by side at the same cost: the strength at which each reaches one KL divergence on neutral texts.

    KL(s)    mean over answer tokens of neutral texts of sum over v of p_base(v) (log p_base(v) - log p_s(v))    nats

The strength is found by bisection; effect and costs are then measured at it, the costs on the texts it was found on, so
that they are equal. Used by the benchmarks that set methods beside each other: `Costs.reaching` finds the strength,
`measured` gives the rows of a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from steerkit.evaluate.intervals import Estimate, interval
from steerkit.evaluate.scorers._answers import answer_kl, calm_pairs
from steerkit.evaluate.scorers.preference_margin import PreferenceMargin
from steerkit.evaluate.scoring import measure, scores_of
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
        margins: the preference margin of each item, nats per token.
        why: why there is no strength.
    """

    name: str
    kl: float
    reached: Reached | None
    figures: Mapping[str, Estimate]
    margins: tuple[float, ...] = ()
    why: str = ""

    def beside(self, other: Row) -> Estimate | None:
        """How much larger the effect is than another's, from the paired differences of the items.

        Args:
            other: measured on the same items.
        """
        if self.reached is None or other.reached is None:
            return None
        return interval(torch.tensor(self.margins), before=torch.tensor(other.margins))

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
        margins = [round(margin, 5) for margin in self.margins]
        plain = {"name": self.name, "kl": self.kl, "reached": reached, "margins": margins, "why": self.why}
        return {**plain, "figures": figures}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Row:
        """Read what `as_json` wrote.

        Args:
            plain: plain data.
        """
        reached = None if plain["reached"] is None else Reached(**plain["reached"])
        figures = {name: Estimate(**figure) for name, figure in plain["figures"].items()}
        return cls(plain["name"], plain["kl"], reached, figures, tuple(plain["margins"]), plain["why"])


HEAD = ["KL wanted", "vector", "strength", "effect", "KL", "perplexity ratio"]


class Costs:
    """What a vector costs by strength, measured as far as asked.

    Args:
        setup: model, tokenizer and the neutral texts that tell the cost.
        vector: the vector, with its own scope.
    """

    def __init__(self, setup: Setup, vector: SteeringVector) -> None:
        self._setup, self._vector, self._known = setup, vector, dict[float, Reached]()

    def at(self, strength: float) -> Reached:
        """The KL divergence at a strength, nats per token; infinite where logits are not finite."""
        if strength not in self._known:
            texts, plain = calm_pairs(self._setup)
            found = self._setup.trial(self._vector, strength).over_answers(texts, answer_kl, beside=plain)
            kl = sum(float(one.sum()) for one in found) / sum(map(len, found))
            self._known[strength] = Reached(strength, kl if math.isfinite(kl) else math.inf)
        return self._known[strength]

    def reaching(self, kl: float) -> Reached | str:
        """The weakest strength on the behaviour's side of neutral that costs a KL divergence, by bisection.

        Costs need not rise all the way from the weakest strength on (a coordinate that is set has no neutral strength),
        so it is looked for upwards from the first strength that costs less than is wanted.

        Args:
            kl: nats per token.

        Returns:
            The strength, or in words why there is none.
        """
        method = method_of(self._vector)
        low = Reached(0.0, 0.0)
        if method.neutral != 0.0:  # nothing is known to cost nothing
            below = next((found for one in method.ladder if (found := self.at(one)).kl < kl), None)
            if below is None:
                least = min(map(self.at, method.ladder), key=lambda one: one.kl)
                return f"every strength of the ladder costs more, {least.strength:g} costs {least.kl:.3g}"
            low = below
        strength = low.strength or method.ladder[0]
        for _ in range(WIDER):
            high = self.at(strength)
            if high.kl >= kl:
                return self._between(low, high, kl)
            low, strength = high, 2 * strength
        return f"none costs so much, {low.strength:g} costs {low.kl:.3g}"

    def _between(self, low: Reached, high: Reached, kl: float) -> Reached | str:
        """The strength between one that costs less and one that costs more."""
        for _ in range(STEPS):
            # KL grows about with the square of the strength, so a line through square roots is nearly right; the middle
            # is taken where one end costs no number, and the line does not creep along an end.
            share = 0.5
            if math.isfinite(high.kl):
                share = (math.sqrt(kl) - math.sqrt(low.kl)) / (math.sqrt(high.kl) - math.sqrt(low.kl))
            found = self.at(low.strength + min(max(share, 0.1), 0.9) * (high.strength - low.strength))
            if abs(found.kl - kl) <= CLOSE * kl:
                return found
            low, high = (found, high) if found.kl < kl else (low, found)
        return f"the cost jumps from {low.kl:.3g} to {high.kl:.3g} at {high.strength:.3g}"


def measured(setup: Setup, name: str, vector: SteeringVector, kls: Sequence[float]) -> list[Row]:
    """One vector at the strengths that cost some KL divergences.

    Args:
        setup: model, tokenizer, held-out pairs and neutral texts.
        name: what to call the vector.
        vector: the vector.
        kls: nats per token.
    """
    plain = replace(vector, calibration={}, suggested_strength=None)  # what it is suggested at says nothing here
    costs, rows = Costs(setup, plain), []
    for kl in kls:
        found = costs.reaching(kl)
        if isinstance(found, str):
            rows.append(Row(name, kl, None, {}, why=found))
            continue
        trial = setup.trial(plain, found.strength)
        scores = measure(trial, ["preference_margin", "divergence"])
        margins = scores_of(trial, PreferenceMargin())["preference_margin"]
        assert isinstance(margins, torch.Tensor)
        figures = {column: scores[column].effect for column in COLUMNS}
        rows.append(Row(name, kl, found, figures, tuple(margins.tolist())))
    return rows
