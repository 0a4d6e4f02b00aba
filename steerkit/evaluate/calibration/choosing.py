"""Choosing on the validation split: screening, climbing the ladder of strengths, and reading texts for loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from steerkit.errors import FitError, SiteError
from steerkit.evaluate.calibration.problem import Problem, layers_name, strength_of
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.scoring import Measured
from steerkit.evaluate.sweeps import Point

__all__ = ["Choosing"]


class Choosing:
    """The search for layers and strength on the validation split.

    Attributes:
        candidates: sets of layers at which the method can be fitted.
        points: everything tried, with its figures.
        skipped: candidates at which the method cannot be fitted, with the reason.

    Args:
        problem: what is calibrated.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.candidates = list(problem.candidates)
        self.points: list[Point] = []
        self.skipped: dict[str, str] = {}

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
        problem = self._problem
        if len(self.candidates) <= problem.search.finalists:
            return self.candidates
        assert problem.setup.data is not None
        count = min(problem.search.screened_items, len(problem.setup.data))
        few = replace(
            problem.setup,
            data=replace(
                problem.setup.data,
                positive=problem.setup.data.positive[:count],
                negative=problem.setup.data.negative[:count],
            ),
            neutral=problem.setup.calm[: max(4, problem.search.neutral_texts // 2)],
        )
        strength = problem.ladder[len(problem.ladder) // 2]
        promised: dict[tuple[int, ...], float] = {}
        for number, layers in enumerate(self.candidates, start=1):
            problem.step(f"screening layer {layers_name(layers)}: {number} of {len(self.candidates)}")
            scores = problem.measure(few, layers, strength, problem.scorers)
            if scores is not None:
                kl = max(scores["kl"].effect.mean, 1e-6)
                promised[layers] = scores[problem.effect].gain.mean / math.sqrt(kl)
        ranked = sorted(promised, key=lambda layers: -promised[layers])
        finalists = ranked[: problem.search.finalists]
        if not problem.search.together:
            return finalists
        together = tuple(sorted({layer for layers in [one for one in ranked if len(one) == 1][:3] for layer in layers}))
        if len(together) > 1 and together not in finalists and self.is_possible(together):
            finalists.append(together)
        return finalists

    def climb(self, layers: tuple[int, ...]) -> list[Point]:
        """Measure rising strengths until one exceeds the budget, and give the points inside it.

        Without a neutral strength none is weaker than another, and all are tried.

        Args:
            layers: where the vector acts.
        """
        inside = []
        for strength in self._problem.ladder:
            point = self.tried(layers, strength)
            if point is not None:
                inside.append(point)
            elif self._problem.is_ladder:
                break
        return inside

    def tried(self, layers: tuple[int, ...], strength: float) -> Point | None:
        """Measure layers at one strength and keep the figures; None where a cost exceeds the budget.

        Args:
            layers: where the vector acts.
            strength: how strongly.
        """
        problem = self._problem
        problem.step(f"layer {layers_name(layers)}, strength {strength:g}")
        scores = problem.measure(problem.setup, layers, strength, problem.scorers)
        if scores is None:
            return None
        point = Point(layers, strength, scores)
        self.points.append(point)
        return None if problem.budget.breaks(scores) else point

    def without_loops(self, inside: Sequence[Point]) -> Point | None:
        """Find the most effective point at which texts repeat no more than allowed, nor at any weaker strength.

        Args:
            inside: points inside the budget.
        """
        problem = self._problem
        looping: dict[Any, float] = {}  # the weakest strength known to loop, by its reach
        fine: dict[Any, float] = {}
        for point in sorted(inside, key=lambda point: -problem.gain(point).mean):
            reach = problem.reach(strength_of(point))
            ladder = (point.layers, None if problem.is_ladder else strength_of(point))
            if not problem.gain(point).low > 0 or reach >= looping.get(ladder, math.inf):
                continue
            below = {
                strength_of(other)
                for other in inside
                if other.layers == point.layers and problem.reach(strength_of(other)) <= reach
            }
            for lower in sorted(below, key=problem.reach) if problem.is_ladder else [strength_of(point)]:
                if problem.reach(lower) <= fine.get(ladder, -math.inf):
                    continue
                problem.step(f"texts at layer {layers_name(point.layers)}, strength {lower:g}")
                scores = problem.measure(problem.setup, point.layers, lower, problem.of_texts)
                if scores is not None:
                    self._remember(point.layers, lower, scores)
                if scores is None or problem.budget.breaks(scores, due=["repetition"]):
                    looping[ladder] = problem.reach(lower)
                    break
                fine[ladder] = problem.reach(lower)
            else:
                return next(one for one in self.points if one.layers == point.layers and one.strength == point.strength)
        return None

    def _remember(self, layers: tuple[int, ...], strength: float, scores: dict[str, Measured]) -> None:
        """Add figures to the point they belong to."""
        for place, point in enumerate(self.points):
            if point.layers == layers and point.strength == strength:
                self.points[place] = replace(point, scores={**point.scores, **scores})
