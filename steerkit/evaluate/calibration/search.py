"""Calibration: the largest effect inside a budget of costs, found on one split of the data and confirmed on another.

1. Part of the training items becomes the validation split; the method is fitted on the rest.
2. Every candidate set of layers is screened at one strength on few items, and those not clearly behind on some more.
   Effects grow about linearly with the strength and the KL divergence about quadratically, so candidates are ranked by
   `effect * sqrt(max_kl / kl)`, the effect they promise at the KL budget.
   With `screen="attribution"` slopes at strength 0 take the place of this: the effect's, and the KL divergence's
   curvature. Settings of the method that are tried (`Search.settings`) each go through this and the next two steps.
3. The best candidates climb the ladder of strengths, from where ranking lets expect that the budget ends, up until one
   is outside of it, else down. A strength counts only if all below it are inside too, which is looked at for the place
   that is chosen: a loop has a low perplexity, so a figure that falls again is no proof of health.
   Costs are measured on few texts first, and on all where the interval holds the limit; effects too, and on all items
   only where another point is not clearly better.
4. Texts are generated for the most effective strengths first, until one repeats itself no more than allowed.
5. The method is fitted again on all training items, and effect, costs and controls (random directions of the same norm,
   fits on shuffled labels) are measured once on the held-out items and on other neutral texts. Only this counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from steerkit.evaluate.calibration.budget import Budget, Search
from steerkit.evaluate.calibration.choosing import Choosing
from steerkit.evaluate.calibration.confirming import confirm, nothing_found
from steerkit.evaluate.calibration.problem import Problem, problem_of, strength_of
from steerkit.evaluate.calibration.result import Calibration
from steerkit.evaluate.calibration.sampling import sampled_points
from steerkit.evaluate.calibration.verdict import unfound
from steerkit.evaluate.confounding import warn_of_confounds
from steerkit.evaluate.fits import Fits
from steerkit.evaluate.scorers._base import Scorer
from steerkit.evaluate.setup import Setup, free_unused
from steerkit.evaluate.store import Store
from steerkit.evaluate.sweeps import Point
from steerkit.methods._base import Method, takes_pair
from steerkit.prompts.contrast_set import ContrastSet

__all__ = ["calibrate"]


def calibrate(
    setup: Setup,
    train: ContrastSet,
    *,
    method: str | Method = "caa",
    settings: dict[str, Any] | None = None,
    readout: str | int | None = None,
    budget: Budget | None = None,
    search: Search | None = None,
    effect: str | Scorer = "preference_margin",
    beside: Sequence[str | Scorer] = (),
    store: Store | None = None,
    scope: str | None = None,
    validation: ContrastSet | None = None,
    kinds: Sequence[str] | None = None,
    step: Callable[[str], None] = lambda note: None,
) -> Calibration:
    """Find the layers and the strength with the largest effect inside the budget, and confirm them on held-out items.

    Args:
        setup: model, tokenizer and the held-out items, which are looked at only to confirm.
        train: what is fitted on and, a part of it, chosen on.
        method: a name, or a method with its settings.
        settings: the method's settings where `method` is a name.
        readout: which tokens are read; None takes the method's own.
        budget: what steering may cost.
        search: where and how to look.
        effect: the scorer whose first column shows the effect; more is better, unless the column says otherwise.
        beside: scorers that choose nothing, such as markers of a refusal: shown for the strengths whose texts are read,
            and for the one that is found.
        store: figures already there are not measured again.
        scope: which tokens are written; None takes the method's own.
        validation: items to choose on; None takes a part of the training items.
        kinds: kinds of site, such as ``["mlp_out"]``; None takes the method's own.
        step: called with a few words before each measurement, for a progress line.

    Returns:
        What was found, and whether it is confirmed.

    Raises:
        DataError: there are too few items to split, or they lack what the scorer needs.
        SteerError: see `steerkit.fit` and `steerkit.steer`.
    """
    free_unused()
    fits = Fits(setup, train, method, (), settings, readout, scope, kinds)
    read = readout or fits.kind.readout
    if not takes_pair(fits.kind):
        warn_of_confounds(setup.tokenizer, train, readout=read, chat_template_kwargs=setup.chat_template_kwargs)
    how = search or Search()
    found = []
    for variant in how.variants:
        one = fits.varied(variant)
        problem = problem_of(one, validation, budget or Budget(), how, effect, beside, store, step)
        choosing = Choosing(problem)
        found.append(Chosen(variant, problem, choosing, _best(problem, choosing)))
    best = max(found, key=lambda one: one.gain)
    if best.point is None:
        answer = nothing_found(best.problem, best.choosing, unfound(best.problem, best.choosing.points))
    else:
        answer = confirm(best.problem, best.point, best.choosing)
    return answer if len(found) == 1 else replace(answer, variants=tuple(one.as_row() for one in found))


class Chosen(NamedTuple):
    """What was chosen on the validation split with some settings of the method.

    Attributes:
        settings: those that differ from the method's own.
        problem: what was calibrated.
        choosing: the search.
        point: the best one; None where there is none inside the budget.
    """

    settings: Mapping[str, Any]
    problem: Problem
    choosing: Choosing
    point: Point | None

    @property
    def gain(self) -> float:
        """Its mean effect, counted so that more is better."""
        return -math.inf if self.point is None else self.problem.gain(self.point).mean

    def as_row(self) -> dict[str, Any]:
        """Plain data for JSON."""
        point = self.point
        where: dict[str, Any] = {"layers": [], "strength": None, "gain": None}
        if point is not None:
            where = {"layers": list(point.layers), "strength": point.strength, "gain": self.gain}
        return {"settings": dict(self.settings), **where}


def _best(problem: Problem, choosing: Choosing) -> Point | None:
    """The best point inside the budget, on the validation split."""
    problem.step("fitting")
    choosing.drop_impossible()
    if problem.search.trials is not None:
        inside = [(point.layers, strength_of(point)) for point in sampled_points(problem, choosing)]
    else:
        inside = [place for layers in choosing.screened() for place in choosing.climb(layers)]
    return choosing.without_loops(inside)
