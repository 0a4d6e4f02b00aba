"""Choosing on the validation split: screening, climbing the ladder of strengths, and reading texts for loops.

What is clearly behind on few items is not measured on all (successive halving; Jamieson and Talwalkar 2016, arXiv
1502.07943), where "clearly" is what the intervals say, not a fixed share. What is chosen was measured on all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from steerkit.errors import FitError, SiteError
from steerkit.evaluate.attribution.promises import Promise, Promises
from steerkit.evaluate.calibration.problem import Place, Problem, layers_name
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.scoring import Measured
from steerkit.evaluate.sweeps import Point

__all__ = ["Choosing", "survivors"]

Kind = TypeVar("Kind")
_NEAR = 0.8
"""What promises so much of the most that anything promises climbs too: promises are known to about a tenth."""
_AS_MANY = 2
"""So many times as many may: a climb that begins at the promised strength costs half of one from the bottom."""
_TOGETHER = 3
"""So many of the best single blocks are tried together."""


class Choosing:
    """The search for layers and strength on the validation split.

    Attributes:
        candidates: sets of layers at which the method can be fitted.
        skipped: candidates at which the method cannot be fitted, with the reason.
        promised: what the slopes of candidates promise, where they were ranked by these.

    Args:
        problem: what is calibrated.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.candidates = list(problem.candidates)
        self._points: dict[Place, Point] = {}
        self._ends: dict[tuple[int, ...], float] = {}  # by candidate, the reach at which the KL budget may end
        self._screened_at: float | None = None
        self.skipped: dict[str, str] = {}
        self.promised: dict[tuple[int, ...], Promise] = {}

    @property
    def points(self) -> list[Point]:
        """What was tried, with the figures of the most items each was measured on."""
        return list(self._points.values())

    @property
    def promised_rows(self) -> dict[str, dict[str, Any]]:
        """What the slopes of candidates promise, as plain data, those that promise most first."""
        return {layers_name(layers): promise.as_row() for layers, promise in self.promised.items()}

    def drop_impossible(self) -> None:
        """Drop candidates at which the method cannot be fitted, and fail at once if none is left.

        Raises:
            FitError: it can be fitted at none of them.
        """
        self.candidates = [layers for layers in self.candidates if self.is_possible(layers)]
        if not self.candidates:
            reason = "; ".join(f"{layers}: {said}" for layers, said in self.skipped.items())
            raise FitError(f"calibrate: the method can be fitted at none of the candidates ({reason})")

    def is_possible(self, layers: tuple[int, ...]) -> bool:
        """Whether the method gives a vector at these layers, and a random control to compare it with.

        Args:
            layers: blocks counted from 0.
        """
        try:
            random_like(self._problem.fits.at(layers), seed=0)
        except (FitError, SiteError) as error:
            self.skipped[layers_name(layers)] = str(error)
            return False
        return True

    def screened(self) -> list[tuple[int, ...]]:
        """Rank the candidates by effect per KL divergence at one strength; give the best, and single ones together."""
        problem, search = self._problem, self._problem.search
        if search.screen == "attribution":
            return self._attributed()
        if len(self.candidates) <= search.finalists:
            return self.candidates
        strength = self._screened_at = problem.ladder[len(problem.ladder) // 2]
        wanted = max(search.finalists, _TOGETHER) if search.together else search.finalists
        promised: dict[tuple[int, ...], Estimate] = {}
        roots: dict[tuple[int, ...], float] = {}
        left = self.candidates
        for few in problem.few:
            promised = {}
            for number, layers in enumerate(left, start=1):
                problem.step(f"screening layer {layers_name(layers)}: {number} of {len(left)}")
                scores = problem.measure(few, layers, strength, problem.scorers)
                if scores is not None:
                    roots[layers] = root = math.sqrt(max(scores["kl"].effect.mean, 1e-6))
                    promised[layers] = Estimate(*(end / root for end in scores[problem.effect].gain))
            left = survivors(promised, wanted)
        ranked = sorted(left, key=lambda layers: -promised[layers].mean)
        finalists = ranked[: search.finalists]
        together = self._together(ranked)
        if together is not None and together not in finalists:
            finalists.append(together)
            roots[together] = sum(roots[layer,] for layer in together)  # as if all pushed one way, which is the most
        at_budget = problem.reach(strength) * math.sqrt(problem.budget.max_kl)
        self._ends = {layers: at_budget / root for layers, root in roots.items()}
        return finalists

    def _together(self, ranked: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
        """The best single blocks in one set; None where they are none, or not wanted."""
        singles = [one for one in ranked if len(one) == 1][:_TOGETHER]
        together = tuple(sorted({layer for layers in singles for layer in layers}))
        is_wanted = self._problem.search.together and len(together) > 1
        return together if is_wanted and self.is_possible(together) else None

    def _attributed(self) -> list[tuple[int, ...]]:
        """Rank the candidates by the slopes of their effects and costs, without steering; give the best."""
        problem = self._problem
        problem.step(f"slopes at {len(self.candidates)} sets of layers")
        promises = Promises(
            problem.few[-1],
            problem.fits,
            problem.scorer,
            max_kl=problem.budget.max_kl,
            is_above=problem.ladder[0] > (problem.method.neutral_strength or 0.0),
            seed=problem.search.seed,
        )
        ranked = list(promises.of(self.candidates))
        together = self._together(ranked)
        self.promised = promises.of(self.candidates if together is None else [*self.candidates, together])
        self._ends = {layers: promise.strength for layers, promise in self.promised.items()}
        best = max(promise.effect for promise in self.promised.values())
        near = [layers for layers, promise in self.promised.items() if promise.effect >= _NEAR * best]
        return (near or list(self.promised))[: _AS_MANY * problem.search.finalists]

    def climb(self, layers: tuple[int, ...]) -> list[Place]:
        """Find the strengths inside the budget among which the most effective one is to be looked for.

        Where nothing is known of the layers, from the weakest on, up to the first that exceeds the budget. Where
        screening or slopes tell about where it ends, from there on, up or down: weaker ones have less effect, but where
        the one that was screened has more all count, and those below a chosen place are looked at (`without_loops`).

        Args:
            layers: where the vector acts.

        Returns:
            Those found inside, from the weakest on.
        """
        ladder = [(layers, strength) for strength in self._problem.ladder]
        end = self._ends.get(layers)
        if end is None or not self._problem.is_ladder:
            return self._inside(ladder)
        reaches = [self._problem.reach(strength) for _, strength in ladder]
        start = max((number for number, reach in enumerate(reaches) if reach <= end), default=0)
        found = self._inside(ladder[start : start + 1])
        if found:
            for place in ladder[start + 1 :]:
                higher = self._inside([place])
                if not higher:
                    break
                found += higher
        else:
            found = next((one for place in reversed(ladder[:start]) if (one := self._inside([place]))), [])
        weaker = ladder[: ladder.index(found[-1])] if found else []
        screened = [place for place in weaker if place[1] == self._screened_at]
        if screened and self._more_effective(screened, found[-1]):
            found = self._inside([*weaker, found[-1]])
        return found

    def _more_effective(self, weaker: Sequence[Place], place: Place) -> list[Place]:
        """Those of some weaker places that have more effect than one, on the few items that all were measured on."""
        problem = self._problem
        found = problem.measured(problem.rungs[0], [*weaker, place], [problem.scorer])
        gains = {one: scores[problem.effect].gain.mean for one, scores in found if scores is not None}
        return [one for one in weaker if gains.get(one, -math.inf) > gains.get(place, -math.inf)]

    def _inside(self, places: Sequence[Place]) -> list[Place]:
        """Those inside the budget: of a ladder up to the first that exceeds it.

        Few texts often tell what a strength costs; it is measured on all where their interval holds the limit. Without
        a neutral strength none is weaker than another, and all are tried.
        """
        problem = self._problem
        inside = doubtful = list(places)
        for setup in problem.rungs:
            open_ones, scorers = [], problem.scorers if setup is problem.rungs[0] else problem.of_costs
            for place, scores in problem.measured(setup, doubtful, scorers, self._tell):
                if scores is not None:
                    self._remember(place, scores)
                is_inside = scores is not None and problem.keeps(scores, surely=setup is not problem.setup)
                if is_inside is None:
                    open_ones.append(place)
                elif not is_inside:
                    beyond = inside.index(place)
                    inside = inside[:beyond] + ([] if problem.is_ladder else inside[beyond + 1 :])
                    if problem.is_ladder:
                        break
            doubtful = open_ones
        return inside

    def tried(self, layers: tuple[int, ...], strength: float) -> Point | None:
        """Measure layers at one strength and keep the figures; None where a cost exceeds the budget.

        Args:
            layers: where the vector acts.
            strength: how strongly.
        """
        problem, place = self._problem, (layers, strength)
        self._tell(place)
        scores = problem.measure(problem.setup, layers, strength, problem.scorers)
        if scores is None:
            return None
        point = self._remember(place, scores)
        return None if problem.budget.breaks(scores) else point

    def without_loops(self, inside: Sequence[Place]) -> Point | None:
        """Find the most effective place at which texts repeat no more than allowed, nor at any weaker strength.

        Args:
            inside: layers and strengths inside the budget.
        """
        problem, left, listed = self._problem, list(inside), set(inside)
        looping: dict[Any, float] = {}  # the weakest strength known to loop, by its reach
        while left:
            place = self._leading(left)
            if place is None:
                return None
            left.remove(place)
            point, reach = self._points[place], problem.reach(place[1])
            ladder = (place[0], None if problem.is_ladder else place[1])
            if not problem.gain(point).low > 0 or reach >= looping.get(ladder, math.inf):
                continue
            below = self._below(place, inside) if problem.is_ladder else [place]
            ill = self._first_ill(below)
            if ill is not None:
                looping[ladder] = problem.reach(ill[1])
                left += [one for one in below[: below.index(ill)] if one not in listed]
                listed.update(left)
                continue
            unlisted = [one for one in below if one not in listed]
            better = self._more_effective(unlisted, place) if unlisted else []
            if better:
                left += [*better, place]
                listed.update(better)
                continue
            costs = problem.measure(problem.setup, *place, problem.of_costs)  # few texts may have told them so far
            if costs is not None and problem.keeps(costs):
                return self._remember(place, costs)
        return None

    def _first_ill(self, below: Sequence[Place]) -> Place | None:
        """The weakest place outside of the budget or with texts that repeat more than allowed."""
        problem = self._problem
        unseen = [one for one in below if one not in self._points]
        inside = self._inside(unseen)
        outside = next((one for one in unseen if one not in inside), None)
        weaker = below if outside is None else below[: below.index(outside)]
        for place, scores in problem.measured(problem.setup, weaker, problem.of_texts, self._tell_texts):
            if scores is not None:
                self._remember(place, scores)
            if scores is None or problem.budget.breaks(scores, due=["repetition"]):
                return place
        return outside

    def _below(self, place: Place, inside: Sequence[Place]) -> list[Place]:
        """A place and what is weaker at the same layers, from the weakest on.

        All of the ladder: a climb that began higher has left some out.
        """
        problem, layers = self._problem, place[0]
        known = {one for one in inside if one[0] == layers}
        if layers in self._ends:
            known |= {(layers, strength) for strength in problem.ladder}
        ranked = sorted(known, key=lambda one: problem.reach(one[1]))
        return [one for one in ranked if problem.reach(one[1]) <= problem.reach(place[1])]

    def _leading(self, places: Sequence[Place]) -> Place | None:
        """The most effective place; those clearly behind another on few items are not measured on all."""
        problem, left = self._problem, list(places)
        gains: dict[Place, Estimate] = {}
        for setup in problem.rungs:
            gains = {}
            for layers in dict.fromkeys(place[0] for place in left):
                mine = [place for place in left if place[0] == layers]
                for place, scores in problem.measured(setup, mine, [problem.scorer], self._tell):
                    if scores is not None:
                        gains[place] = problem.gain(self._remember(place, scores))
            left = survivors(gains, 1)
        return max(left, key=lambda place: gains[place].mean, default=None)

    def _tell(self, place: Place) -> None:
        self._problem.step(f"layer {layers_name(place[0])}, strength {place[1]:g}")

    def _tell_texts(self, place: Place) -> None:
        self._problem.step(f"texts at layer {layers_name(place[0])}, strength {place[1]:g}")

    def _remember(self, place: Place, scores: dict[str, Measured]) -> Point:
        """Add figures to the point they belong to; those of more items stay."""
        known = self._points.setdefault(place, Point(*place, {}))
        newer = {
            name: one
            for name, one in scores.items()
            if name not in known.scores or known.scores[name].items <= one.items
        }
        self._points[place] = replace(known, scores={**known.scores, **newer})
        return self._points[place]


def survivors(found: Mapping[Kind, Estimate], wanted: int) -> list[Kind]:
    """Those that may still be among the best, by their intervals.

    Args:
        found: more is better.
        wanted: how many of the best are looked for.

    Returns:
        All but those whose upper end lies below the lower ends of so many others, in the order given.

    Example:
        >>> survivors({"a": Estimate(3, 2, 4), "b": Estimate(2, 1.5, 2.5), "c": Estimate(1, 0, 1.9)}, 1)
        ['a', 'b']
    """
    lows = sorted((one.low for one in found.values()), reverse=True)
    bar = lows[wanted - 1] if len(lows) >= wanted else -math.inf
    return [key for key, one in found.items() if not one.high < bar]
