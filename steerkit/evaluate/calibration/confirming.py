"""Confirming on the held-out items: effect, costs and controls of the chosen point, measured once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from steerkit.errors import FitError
from steerkit.evaluate.calibration.choosing import Choosing
from steerkit.evaluate.calibration.problem import Problem, layers_name, strength_of
from steerkit.evaluate.calibration.result import Calibration
from steerkit.evaluate.controls import refits
from steerkit.evaluate.curve import strength_response
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.refit_results import Refits
from steerkit.evaluate.scoring import Measured, measure
from steerkit.evaluate.sweeps import Point
from steerkit.fitting.held_out import separation
from steerkit.methods._base import takes_pair
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["confirm", "nothing_found"]


def confirm(problem: Problem, best: Point, choosing: Choosing) -> Calibration:
    """Fit on all training items at the chosen layers and measure once on the held-out ones.

    Args:
        problem: what is calibrated.
        best: the point that was chosen.
        choosing: the search, for what was tried on the way.

    Returns:
        What was found, and whether it is confirmed.
    """
    strength = strength_of(best)
    problem.step("fitting on all items")
    try:
        vector = replace(problem.final, layers=best.layers).at(best.layers)
    except FitError as error:  # a method that chooses among its sites may find none on other items
        return nothing_found(
            problem, choosing, f"layers {layers_name(best.layers)} were best, but on all items the fit fails: {error}"
        )
    problem.step("effect by strength on held-out items")
    curve = strength_response(
        problem.confirming,
        vector,
        _strengths_around(strength, problem.kind.neutral),
        scorers=[problem.scorer],
        controls=problem.search.controls,
        control_strengths=[strength],
        seed=problem.search.seed,
        step=lambda: problem.step("effect by strength on held-out items"),
    )
    problem.step("costs on other texts")
    trial = problem.confirming.trial(vector, strength)
    costs = measure(trial, ["divergence", *problem.of_texts], seed=problem.search.seed)
    confirmed = {**curve.points[curve.strengths.index(strength)], **costs}
    refitted = _refitted(problem, vector)
    shuffled = _shuffled(problem, refitted, strength)
    randoms = [control[strength] for control in curve.controls]
    works, verdict = _verdict(problem, confirmed, [*randoms, *shuffled])
    found = Calibration(
        works=works,
        verdict=verdict,
        vector=None,
        layers=best.layers,
        strength=strength,
        effect=problem.effect,
        budget=problem.budget,
        points=tuple(choosing.points),
        chosen=dict(best.scores),
        confirmed=confirmed,
        curve=curve,
        shuffled=tuple(shuffled),
        search=problem.search,
        refits={} if refitted is None else refitted.as_json(),
        skipped=choosing.skipped,
    )
    return replace(found, vector=_finished(problem, vector, found))


def nothing_found(problem: Problem, choosing: Choosing, reason: str) -> Calibration:
    """The result where nothing was found.

    Args:
        problem: what is calibrated.
        choosing: the search, for what was tried.
        reason: why there is nothing, in words.
    """
    return Calibration(
        works=False,
        verdict=f"nothing works: {reason}",
        vector=None,
        layers=(),
        strength=None,
        effect=problem.effect,
        budget=problem.budget,
        points=tuple(choosing.points),
        search=problem.search,
        skipped=choosing.skipped,
    )


def _strengths_around(strength: float, neutral: float | None) -> list[float]:
    """The strength with its half, and where one leaves the model as it is, that one and both mirrored at it."""
    if neutral is None:
        return sorted([strength / 2, strength])
    reach = strength - neutral
    return sorted([neutral - reach, neutral - reach / 2, neutral, neutral + reach / 2, strength])


def _refitted(problem: Problem, vector: SteeringVector) -> Refits | None:
    """The method fitted again on rearranged training items; None for methods fitted on one pair."""
    if takes_pair(problem.kind):
        return None
    setup = problem.confirming
    return refits(
        setup.model,
        setup.tokenizer,
        problem.final.train,
        vector,
        shuffled=problem.search.controls,
        seed=problem.search.seed,
        batch_size=setup.batch_size,
        chat_template_kwargs=setup.chat_template_kwargs,
    )


def _shuffled(problem: Problem, refitted: Refits | None, strength: float) -> list[float]:
    """Effects of fits on shuffled labels, rescaled to the vector's own norm."""
    effects = []
    for control in () if refitted is None else refitted.matched():
        problem.step("shuffled labels")
        trial = problem.confirming.trial(control, strength)
        effects.append(measure(trial, [problem.scorer])[problem.effect].estimate.mean)
    return effects


def _verdict(problem: Problem, confirmed: dict[str, Measured], controls: Sequence[float]) -> tuple[bool, str]:
    """Whether the held-out items confirm what was chosen, and the reason."""
    measured = confirmed[problem.effect]
    gain, shown = measured.gain, measured.effect
    # On the same items: what items differ in is no doubt about what steering changes in each of them.
    highest = max((measured.gain_of(control) for control in controls), default=math.inf)
    reached = f"{problem.effect} changes by {_span(shown)} on {measured.items} held-out items"
    broken = problem.budget.breaks(confirmed)
    if not gain.low > 0:
        return False, f"nothing works: {reached}, which may be nothing"
    if gain.low <= highest:
        return False, f"nothing works: {reached}, but a control reaches {highest:.3g}"
    if broken:
        return False, f"not confirmed: {reached}, but {' and '.join(broken)}"
    return True, f"{reached}, clear of {len(controls)} controls and inside the budget"


def _finished(problem: Problem, vector: SteeringVector, found: Calibration) -> SteeringVector:
    """The vector with the suggestion, its separation on the held-out items, and how both were found."""
    held_out = dict(vector.held_out)
    data = problem.held_out.data
    if vector.readout is not None and data is not None:
        setup = problem.held_out
        held_out = separation(
            setup.model,
            setup.tokenizer,
            data,
            vector,
            batch_size=setup.batch_size,
            chat_template_kwargs=setup.chat_template_kwargs,
        )
    return replace(
        vector,
        suggested_strength=found.strength,
        calibration=_chosen(problem, found),
        seed=problem.search.seed,
        held_out={**held_out, "calibration": found.as_json()},
    )


def _chosen(problem: Problem, found: Calibration) -> dict[str, Any]:
    """What the file says of its suggested strength; `limit` is the weakest one tried that was outside of the budget."""
    outside = [
        strength_of(point)
        for point in found.points
        if point.layers == found.layers and problem.budget.breaks(dict(point.scores))
    ]
    facts: dict[str, Any] = {"by": "calibrate", "confirmed": found.works, "max_kl": problem.budget.max_kl}
    if "kl" in found.confirmed:
        facts["kl"] = found.confirmed["kl"].effect.mean
    if outside and problem.is_ladder:
        facts["limit"] = min(outside, key=problem.reach)
    return facts


def _span(estimate: Estimate) -> str:
    return f"{estimate.mean:.3g} ({estimate.low:.3g} to {estimate.high:.3g})"
