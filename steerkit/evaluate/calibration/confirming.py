"""Confirming on the held-out items: effect, costs and controls of the chosen point, measured once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from steerkit._support.progress import counted
from steerkit.activations.recording import Activations
from steerkit.errors import FitError
from steerkit.evaluate.calibration.choosing import Choosing
from steerkit.evaluate.calibration.problem import Problem, layers_name, strength_of
from steerkit.evaluate.calibration.result import Calibration
from steerkit.evaluate.calibration.verdict import judged
from steerkit.evaluate.controls import refits
from steerkit.evaluate.curve import strength_response
from steerkit.evaluate.refit_results import Refits
from steerkit.evaluate.scoring import measure
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
        vector = problem.final.at(best.layers)
    except FitError as error:  # a method that chooses among its sites may find none on other items
        return nothing_found(
            problem,
            choosing,
            f"nothing works: layers {layers_name(best.layers)} were best, but on all items the fit fails: {error}",
        )
    strengths = _strengths_around(strength, problem.method.neutral_strength)
    total = len(strengths) + problem.search.controls
    curve = strength_response(
        problem.confirming,
        vector,
        strengths,
        scorers=[problem.scorer],
        controls=problem.search.controls,
        control_strengths=[strength],
        seed=problem.search.seed,
        step=counted(problem.step, "effect on held-out items, and random directions", total),
    )
    problem.step("costs on other texts")
    trial = problem.confirming.trial(vector, strength)
    costs = measure(trial, ["divergence", *problem.of_texts], seed=problem.search.seed)
    confirmed = {**curve.points[curve.strengths.index(strength)], **costs}
    refitted = _refitted(problem, vector, problem.final.acts)
    shuffled = _shuffled(problem, refitted, strength)
    randoms = [control[strength] for control in curve.controls]
    verdict = judged(problem.effect, problem.budget, confirmed, [*randoms, *shuffled])
    found = Calibration(
        works=verdict.works,
        verdict=verdict.words,
        has_effect=verdict.has_effect,
        suggests=verdict.suggests,
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
        promised=choosing.promised_rows,
    )
    return replace(found, vector=_finished(problem, vector, found))


def nothing_found(problem: Problem, choosing: Choosing, reason: str) -> Calibration:
    """The result where nothing was found.

    Args:
        problem: what is calibrated.
        choosing: the search, for what was tried.
        reason: why there is nothing, in one line.
    """
    return Calibration(
        works=False,
        verdict=reason,
        vector=None,
        layers=(),
        strength=None,
        effect=problem.effect,
        budget=problem.budget,
        points=tuple(choosing.points),
        search=problem.search,
        skipped=choosing.skipped,
        promised=choosing.promised_rows,
    )


def _strengths_around(strength: float, neutral: float | None) -> list[float]:
    """The strength with its half, and where one leaves the model as it is, that one and both mirrored at it."""
    if neutral is None:
        return sorted([strength / 2, strength])
    reach = strength - neutral
    return sorted([neutral - reach, neutral - reach / 2, neutral, neutral + reach / 2, strength])


def _refitted(problem: Problem, vector: SteeringVector, acts: Activations | None) -> Refits | None:
    """The method fitted again on rearranged training items; None for methods fitted on one pair."""
    if takes_pair(problem.method):
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
        acts=acts,
    )


def _shuffled(problem: Problem, refitted: Refits | None, strength: float) -> list[float]:
    """Effects of fits on shuffled labels, rescaled to the vector's own norm."""
    effects, controls = [], () if refitted is None else refitted.matched()
    for number, trial in enumerate(problem.confirming.trials((one, strength) for one in controls), start=1):
        problem.step(f"shuffled labels: {number} of {len(controls)}")
        effects.append(measure(trial, [problem.scorer])[problem.effect].estimate.mean)
    return effects


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
        suggested_strength=found.strength if found.suggests else None,
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
    facts: dict[str, Any] = {
        "by": "calibrate",
        "confirmed": found.works,
        "verdict": found.verdict,
        "max_kl": problem.budget.max_kl,
    }
    if "kl" in found.confirmed:
        facts["kl"] = found.confirmed["kl"].effect.mean
    if outside and problem.is_ladder:
        facts["limit"] = min(outside, key=problem.reach)
    return facts
