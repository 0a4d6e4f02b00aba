"""System prompts as rows of a comparison, at their own costs: asking alone, and one method beside it and on top of it.

No budget holds for a system prompt: there is nothing to turn down. Its row says what it costs, and the wording is
chosen on the training items as a method's layers and strength are. Controls of asking are system prompts that ask for
nothing; those of a method on top of it are what either does alone. So that nobody has to compare a cheap request with
dear steering, the method is also turned to about the KL divergence of asking: KL grows with the strength's square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steerkit.errors import SteerError
from steerkit.evaluate.calibration.budget import Budget
from steerkit.evaluate.compare import COSTS, Row, answered
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.overhead import decoding_overhead
from steerkit.evaluate.prompting import NEUTRAL, Prompting, Wording, measure_prompting, training_gains
from steerkit.evaluate.scoring import Measured, measure
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store import Store
from steerkit.evaluate.trial import Trial
from steerkit.methods._registry import method_of
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["AT_KL", "ON_TOP", "PROMPTING", "Asking", "best_method", "is_of"]

PROMPTING = "prompting"
ON_TOP = f" + {PROMPTING}"
AT_KL = f", {PROMPTING}'s KL"
EFFECT = "preference_margin"


def best_method(rows: Sequence[Row]) -> Row | None:
    """The method with the largest effect: of the confirmed ones, else of all; None where none has any.

    Args:
        rows: of the comparison; those of system prompts are not looked at.
    """
    found = [row for row in rows if not row.own_costs and row.effect is not None]
    return max(found, key=lambda row: (row.works, row.effect.mean if row.effect else -math.inf), default=None)


def is_of(row: Row, method: Row | None) -> bool:
    """Whether a row that sets a method beside asking is this method's; true of all other rows.

    Args:
        row: of the comparison.
        method: the row of the method.
    """
    names = [row.method.removesuffix(end) for end in (ON_TOP, AT_KL) if row.method.endswith(end)]
    return not names or (method is not None and names == [method.method])


@dataclass(frozen=True)
class Asking:
    """What asking is measured on.

    Attributes:
        setup: model, tokenizer, held-out items and neutral texts; half of these confirm, as for every method.
        train: training items, on which the wording is chosen.
        systems: the wordings.
        recipe: where they come from.
        questions: answered with and without.
        budget: that of the methods, beside which the costs are told.
        store: figures already there are not measured again.
        seed: fixes the intervals.
        step: called with a few words before each measurement, for a progress line.
    """

    setup: Setup
    train: ContrastSet
    systems: Sequence[str]
    recipe: str
    questions: Sequence[str]
    budget: Budget
    store: Store
    seed: int = 0
    step: Callable[[str], None] = lambda note: None

    def alone(self) -> Row:
        """The row of asking: the best wording on the held-out items, the others beside it."""
        try:
            gains = training_gains(self.setup, self.train, self.systems, EFFECT, **self._common("training items"))
            best = gains.index(max(gains))
            found = self._measured(self.systems)
            nothing = self._measured(NEUTRAL, scorers=[EFFECT])
            chosen = found.wordings[best]
            controls = [one.scores[EFFECT].gain.mean for one in nothing.wordings]
            reached = f"{len(NEUTRAL)} system prompts that ask for nothing"
            trial = self.setup.prompted(chosen.system).trial(None)
            row = self._row(PROMPTING, "System prompt", chosen, controls, reached, trial)
        except SteerError as error:
            return self._failed(PROMPTING, "System prompt", error)
        wordings = [
            {"system": one.system, "training_effect": gain, **_figures(one)}
            for one, gain in zip(found.wordings, gains, strict=True)
        ]
        told = f"{chosen.system!r} was best of {len(self.systems)} on the training items: {row.verdict}"
        over = [found.spread(name) for name in (EFFECT, "kl")]
        if len(self.systems) > 1:
            told += (
                f". All {len(self.systems)} wordings: effect {over[0].mean:+.2f} ({over[0].lowest:+.2f} to "
                f"{over[0].highest:+.2f}), KL {over[1].mean:.3f} ({over[1].lowest:.3f} to {over[1].highest:.3f})"
            )
        return replace(row, verdict=told, wordings=tuple(wordings))

    def under(self, prompting: Row, method: Row, vector: SteeringVector) -> Row:
        """The row of a method on top of asking, at the strength that was found for it alone.

        Args:
            prompting: the row of asking, whose wording is taken.
            method: the method's row.
            vector: as calibrated.
        """
        name, title = f"{method.method}{ON_TOP}", f"{method.title} on top of a system prompt"
        alone = [row.effect.mean for row in (prompting, method) if row.effect is not None]
        try:
            (chosen,) = self._measured([self._chosen(prompting)], vector, method.strength).wordings
            trial = self.setup.prompted(chosen.system).trial(vector, method.strength)
            row = self._row(name, title, chosen, alone, "either alone", trial)
        except SteerError as error:
            return self._failed(name, title, error)
        return replace(row, sites=method.sites, strength=method.strength, recipe=method.recipe)

    def beside(self, prompting: Row, method: Row, vector: SteeringVector) -> Row | None:
        """The row of a method at about the KL divergence of asking; None where no strength leads there.

        Args:
            prompting: the row of asking.
            method: the method's row.
            vector: as calibrated.
        """
        name, title = f"{method.method}{AT_KL}", f"{method.title} at about the KL divergence of a system prompt"
        strength = _turned(prompting, method, method_of(vector).neutral_strength)
        if strength is None or prompting.effect is None:
            return None
        self.step(f"{PROMPTING}: {name}")
        try:
            trial = self.setup.half(1).trial(vector, strength)
            scores = measure(trial, [EFFECT, "divergence", "repetition"], seed=self.seed)
            asked = [prompting.effect.mean]
            row = self._row(name, title, Wording("", scores), asked, "asking", trial)
        except SteerError as error:
            return self._failed(name, title, error)
        return replace(row, sites=method.sites, strength=strength, recipe=method.recipe)

    def _chosen(self, prompting: Row) -> str:
        """The wording that was best on the training items."""
        return str(max(prompting.wordings, key=lambda one: one["training_effect"])["system"])

    def _measured(
        self,
        systems: Sequence[str],
        vector: SteeringVector | None = None,
        strength: float | None = None,
        scorers: Sequence[str] = (EFFECT, "divergence", "repetition"),
    ) -> Prompting:
        note = PROMPTING if vector is None else f"{vector.method}{ON_TOP}"
        options = {**self._common(note), "vector": vector, "strength": strength}
        return measure_prompting(self.setup.half(1), systems, scorers, **options)

    def _common(self, note: str) -> dict[str, Any]:
        return {"store": self.store, "seed": self.seed, "step": lambda: self.step(f"{PROMPTING}: {note}")}

    def _row(
        self,
        name: str,
        title: str,
        chosen: Wording,
        controls: Sequence[float],
        reached: str,
        trial: Trial,
    ) -> Row:
        measured = chosen.scores[EFFECT]
        works = measured.gain.low > max(0.0, *controls)
        self.step(f"{name}: time and texts")
        return Row(
            name,
            title,
            self.recipe,
            sites=(),
            strength=None,
            works=works,
            verdict=_verdict(measured, max(controls), reached, self.budget.breaks(dict(chosen.scores))),
            effect=measured.gain,
            controls=(min(controls), max(controls)),
            costs={cost: chosen.scores[cost].effect for cost in COSTS},
            overhead=decoding_overhead(trial),
            texts=answered(trial, self.questions),
            own_costs=True,
        )

    def _failed(self, name: str, title: str, error: SteerError) -> Row:
        reason = f"could not be measured: {error}"
        return Row(name, title, self.recipe, sites=(), strength=None, works=False, verdict=reason, own_costs=True)


def _turned(prompting: Row, method: Row, neutral: float | None) -> float | None:
    """The strength at which a method costs about what asking does; None where it cannot be told."""
    costs = [(row.costs or {}).get("kl") for row in (prompting, method)]
    means = [cost.mean for cost in costs if cost is not None and cost.mean > 1e-6]  # below is rounding
    if len(means) < 2 or neutral is None or method.strength is None:
        return None
    return float(f"{neutral + (method.strength - neutral) * math.sqrt(means[0] / means[1]):.2g}")


def _verdict(measured: Measured, highest: float, reached: str, broken: Sequence[str]) -> str:
    gain = measured.gain
    said = f"{EFFECT} changes by {gain.mean:.3g} ({gain.low:.3g} to {gain.high:.3g}) on {measured.items} held-out items"
    if not gain.low > 0:
        said += ", which may be nothing"
    elif gain.low > highest:
        said += f", clear of {reached}"
    else:
        said += f", not clear of {reached} ({highest:.3g})"
    return f"{said}; own costs: {' and '.join(broken) if broken else 'inside the budget of the methods'}"


def _figures(wording: Wording) -> dict[str, Any]:
    """Effect and costs of one wording, as plain data."""

    def plain(found: Estimate) -> dict[str, float]:
        return found._asdict()

    return {
        "effect": plain(wording.scores[EFFECT].gain),
        **{cost: plain(wording.scores[cost].effect) for cost in COSTS},
    }
