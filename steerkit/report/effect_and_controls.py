"""Effect and costs over strengths, with the controls that the effect has to exceed."""

from __future__ import annotations

from functools import cached_property

from steerkit._support.progress import counted
from steerkit.errors import DataError, FitError
from steerkit.evaluate.controls import refits
from steerkit.evaluate.curve import Curve, strength_response
from steerkit.evaluate.refit_results import Refits
from steerkit.evaluate.scoring import measure
from steerkit.report.workbench import LEFT_OUT, Workbench

__all__ = ["EffectAndControls"]

EFFECT = "preference_margin"
SCORERS = ("divergence", "repetition", "length")


class EffectAndControls:
    """The strength-response of one vector, beside random directions and refits.

    Args:
        bench: model, vector and items.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    def curve(self) -> Curve:
        """Effect and costs over strengths."""
        reach, centre, given = self._bench.strength - self._bench.centre, self._bench.centre, self._bench.plan.strengths
        halves = [centre - reach / 2, centre + reach / 2] if self._bench.plan.refitted else []
        listed = [centre - reach, *halves] if given is None else list(given)
        listed += [self._bench.strength] + ([] if self._bench.neutral is None else [self._bench.neutral])
        strengths = sorted(set(map(float, listed)))
        scorers = list(SCORERS)
        try:
            _ = self._bench.setup.pairs
            scorers.insert(0, EFFECT)
        except DataError as error:
            self._bench.missing["effect"] = f"no effect is measured: {error}"
        far = strengths[0] if self._bench.strength >= self._bench.centre else strengths[-1]
        chosen = {far, self._bench.strength} - {self._bench.neutral}
        if self._bench.plan.control_strengths is not None:
            chosen = set(map(float, self._bench.plan.control_strengths))
        controls = self._bench.plan.controls if self._bench.missing.get("effect") is None else 0
        total = len(strengths) + controls * len(chosen)
        return strength_response(
            self._bench.setup,
            self._bench.vector,
            strengths,
            scorers=scorers,
            controls=controls,
            control_strengths=sorted(chosen),
            seed=self._bench.plan.seed,
            step=counted(self._bench.step, "effect and costs by strength, and random directions", total),
        )

    @cached_property
    def refits(self) -> Refits | None:
        """Fits on rearranged items."""
        if self._bench.method.readout is None:
            self._bench.missing["refits"] = (
                f"{self._bench.method.name} reads no contrast set, so there are no rows to rearrange"
            )
            return None
        if self._bench.train is None:
            self._bench.missing["refits"] = "the items the vector was fitted on are not known here"
            return None
        if not self._bench.plan.refitted:
            self._bench.missing["refits"] = LEFT_OUT
            return None
        self._bench.step("fits on rearranged items")
        try:
            return refits(
                self._bench.model,
                self._bench.tokenizer,
                self._bench.train,
                self._bench.vector,
                shuffled=self._bench.plan.controls,
                seed=self._bench.plan.seed,
                batch_size=self._bench.plan.batch_size,
            )
        except FitError as error:
            self._bench.missing["refits"] = str(error)
            return None

    def shuffled(self) -> list[float]:
        """Effects of fits on shuffled labels at the suggested strength."""
        if self.refits is None or "effect" in self._bench.missing:
            return []
        effects, controls = [], self.refits.matched()[: self._bench.plan.shuffled]
        trials = self._bench.setup.trials((one, self._bench.strength) for one in controls)
        for number, trial in enumerate(trials, start=1):
            self._bench.step(f"shuffled labels: {number} of {len(controls)}")
            found = measure(trial, [EFFECT], seed=self._bench.plan.seed)
            effects.append(found[EFFECT].estimate.mean)
        return effects
