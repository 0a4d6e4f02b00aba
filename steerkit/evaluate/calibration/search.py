"""Calibration: the largest effect inside a budget of costs, found on one split of the data and confirmed on another.

1. Part of the training items becomes the validation split; the method is fitted on the rest.
2. Every candidate set of layers is screened at one strength on a few items. Effects grow about linearly with the
   strength and the KL divergence about quadratically, so candidates are ranked by `effect * sqrt(max_kl / kl)`, the
   effect they promise at the KL budget.
3. The best candidates climb the ladder of strengths until one is outside of the budget. A strength counts only if all
   below it are inside too: a loop has a low perplexity, so a figure that falls again is no proof of health.
4. Texts are generated for the most effective strengths first, until one repeats itself no more than allowed.
5. The method is fitted again on all training items, and effect, costs and controls (random directions of the same norm,
   fits on shuffled labels) are measured once on the held-out items and on other neutral texts. Only this counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from steerkit.errors import DataError, FitError, SiteError, SteerError
from steerkit.evaluate.calibration.budget import Budget, Calibration, Search, default_candidates
from steerkit.evaluate.confounding import warn_of_confounds
from steerkit.evaluate.controls import FEWEST, Refits, refits
from steerkit.evaluate.curve import random_like, strength_response
from steerkit.evaluate.intervals import Estimate, NotScored
from steerkit.evaluate.scorers._base import Scorer
from steerkit.evaluate.scoring import Measured, measure, scorer_of
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store_identity import digest_of, setup_identity
from steerkit.evaluate.sweeps import Fits, Point, Store, measure_point
from steerkit.fitting.held_out import separation
from steerkit.methods._base import Method, takes_pair
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

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
    fits = Fits(setup, train, method, (), settings, readout, scope, kinds)
    read = readout or fits.kind.readout
    if not takes_pair(fits.kind):
        warn_of_confounds(setup.tokenizer, train, readout=read, chat_template_kwargs=setup.chat_template_kwargs)
    return _Search(fits, validation, budget or Budget(), search or Search(), effect, beside, store, step).run()


class _Search:
    """One calibration on its way."""

    def __init__(
        self,
        fits: Fits,
        validation: ContrastSet | None,
        budget: Budget,
        search: Search,
        effect: str | Scorer,
        beside: Sequence[str | Scorer],
        store: Store | None,
        step: Callable[[str], None],
    ) -> None:
        self.budget, self.search, self.step = budget, search, step
        self.store = Store() if store is None else store
        self.scorer = scorer_of(effect)
        self.effect = next(iter(self.scorer.columns))
        divergence = scorer_of("divergence")
        self.scorers = list({scorer.name: scorer for scorer in (self.scorer, divergence)}.values())
        self.of_texts = [scorer_of(one) for one in ("repetition", *beside)]
        self.final, self.held_out, self.kind = fits, fits.setup, fits.kind
        rest = fits.train
        if validation is None and takes_pair(fits.kind):
            raise DataError(f"calibrate: {fits.kind.name} is fitted on one pair of prompts; give validation items too")
        if validation is None:
            rest, validation = rest.split(held_out=search.validation, seed=search.seed)
        if not takes_pair(fits.kind) and len(rest) < FEWEST:
            raise DataError(f"calibrate: {len(rest)} items are left to fit on; give at least {FEWEST}")
        if len(self.held_out.calm) < 2:
            raise DataError("calibrate: one neutral text cannot both choose and confirm; give at least two")
        calm = self.held_out.half(0).calm[: search.neutral_texts]
        prompts = self.held_out.prompts
        self.setup = replace(
            self.held_out,
            data=validation,
            neutral=calm,
            prompts=None if prompts is None else prompts[0::2],
        )
        self.confirming = replace(self.held_out.half(1), prompts=None if prompts is None else prompts[1::2])
        depth = self.setup.decoder.num_layers
        listed = search.candidates
        if listed is None:
            own = [site.layer for site in fits.method_object.sites(self.setup.decoder)]
            listed = default_candidates(self.kind, depth, [own])
        self.candidates = [tuple(sorted(set(layers))) for layers in listed]
        self.ladder = sorted(search.strengths or self.kind.ladder, key=self.reach)
        if not self.candidates or not self.ladder:
            raise DataError("calibrate: there is no set of layers or no strength to try; give some")
        if len({strength > (self.kind.neutral or 0.0) for strength in self.ladder}) > 1:
            raise DataError(
                f"calibrate: strengths {', '.join(f'{one:g}' for one in self.ladder)} lie on both sides of neutral; "
                "give those of one side"
            )
        every = sorted({layer for layers in self.candidates for layer in layers})
        self.fits = replace(fits, setup=self.setup, train=rest, layers=every)
        self.points: list[Point] = []
        self.skipped: dict[str, str] = {}
        self.identity = digest_of(setup_identity(self.setup))

    @property
    def is_ladder(self) -> bool:
        """Whether strengths lead away from one that changes nothing, so that one can be weaker than another."""
        return self.kind.neutral is not None

    def reach(self, strength: float) -> float:
        """How strong a strength is: its distance from the neutral one."""
        return abs(strength - (self.kind.neutral or 0.0))

    def run(self) -> Calibration:
        """All steps."""
        self.step("fitting")
        self.drop_impossible()
        if self.search.trials is not None:
            tried = self.optimise()
        else:
            tried = [point for layers in self.screened() for point in self.climb(layers)]
        best = self.without_loops(tried)
        if best is None:
            return self.nothing("no layer and strength tried has a positive effect inside the budget")
        return self.confirm(best)

    def drop_impossible(self) -> None:
        """Leave out candidates at which the method cannot be fitted; say so before the long part, if it is all."""
        self.candidates = [layers for layers in self.candidates if self.is_possible(layers)]
        if not self.candidates:
            reason = "; ".join(f"{layers}: {said}" for layers, said in self.skipped.items())
            raise FitError(f"calibrate: the method can be fitted at none of the candidates ({reason})")

    def is_possible(self, layers: tuple[int, ...]) -> bool:
        """Whether there is a vector at these layers, and a random control to hold it against."""
        try:
            random_like(self.fits.at(layers), seed=0)
        except (FitError, SiteError) as error:
            self.skipped[_named(layers)] = str(error)
            return False
        return True

    def nothing(self, reason: str) -> Calibration:
        """The result where nothing was found."""
        return Calibration(
            works=False,
            verdict=f"nothing works: {reason}",
            vector=None,
            layers=(),
            strength=None,
            effect=self.effect,
            budget=self.budget,
            points=tuple(self.points),
            search=self.search,
            skipped=self.skipped,
        )

    def measure(
        self, setup: Setup, layers: Sequence[int], strength: float, scorers: list[Scorer]
    ) -> dict[str, Measured] | None:
        """Figures of one point, from the store where they are there; None where the model says nothing finite."""
        identity = self.identity if setup is self.setup else digest_of(setup_identity(setup))
        vector = self.fits.at(layers)
        try:
            return measure_point(
                setup, vector, strength, scorers, identity=identity, store=self.store, seed=self.search.seed
            )
        except NotScored:
            return None

    def gain(self, point: Point) -> Estimate:
        """The effect of a point, counted so that more is better."""
        return point.scores[self.effect].gain

    def screened(self) -> list[tuple[int, ...]]:
        """The candidates that promise most at the KL budget, and the best single blocks together."""
        if len(self.candidates) <= self.search.finalists:
            return self.candidates
        assert self.setup.data is not None
        count = min(self.search.screened_items, len(self.setup.data))
        few = replace(
            self.setup,
            data=replace(
                self.setup.data,
                positive=self.setup.data.positive[:count],
                negative=self.setup.data.negative[:count],
            ),
            neutral=self.setup.calm[: max(4, self.search.neutral_texts // 2)],
        )
        strength = self.ladder[len(self.ladder) // 2]
        promised: dict[tuple[int, ...], float] = {}
        for layers in self.candidates:
            self.step(f"screening layer {_named(layers)}")
            scores = self.measure(few, layers, strength, self.scorers)
            if scores is not None:
                kl = max(scores["kl"].effect.mean, 1e-6)
                promised[layers] = scores[self.effect].gain.mean / math.sqrt(kl)
        ranked = sorted(promised, key=lambda layers: -promised[layers])
        finalists = ranked[: self.search.finalists]
        if not self.search.together:
            return finalists
        together = tuple(sorted({layer for layers in [one for one in ranked if len(one) == 1][:3] for layer in layers}))
        if len(together) > 1 and together not in finalists and self.is_possible(together):
            finalists.append(together)
        return finalists

    def climb(self, layers: tuple[int, ...]) -> list[Point]:
        """Figures at rising strengths, up to the first that is outside of the budget; those inside.

        Without a neutral strength none is weaker than another, and all are tried.
        """
        inside = []
        for strength in self.ladder:
            point = self.tried(layers, strength)
            if point is not None:
                inside.append(point)
            elif self.is_ladder:
                break
        return inside

    def tried(self, layers: tuple[int, ...], strength: float) -> Point | None:
        """One point measured and kept; None where it is outside of the budget."""
        self.step(f"layer {_named(layers)}, strength {strength:g}")
        scores = self.measure(self.setup, layers, strength, self.scorers)
        if scores is None:
            return None
        point = Point(layers, strength, scores)
        self.points.append(point)
        return None if self.budget.breaks(scores) else point

    def optimise(self) -> list[Point]:
        """Points tried by optuna's sampler under the budget as constraint; those inside."""
        try:
            import optuna
        except ModuleNotFoundError:
            raise SteerError("--trials needs optuna; pip install 'steerkit-hf[search]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        inside: list[Point] = []
        broken: list[tuple[tuple[int, ...], float]] = []
        weakest, strongest = sorted((self.ladder[0], self.ladder[-1]))

        def objective(trial: Any) -> float:
            layers = self.candidates[trial.suggest_int("candidate", 0, len(self.candidates) - 1)]
            strength = float(f"{trial.suggest_float('strength', weakest, strongest):.3g}")
            point = self.tried(layers, strength)
            trial.set_constraint("budget", -1.0 if point else 1.0)
            if point is None:
                broken.append((layers, strength))
                return 0.0
            inside.append(point)
            return self.gain(point).mean

        sampler = optuna.samplers.TPESampler(seed=self.search.seed)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.optimize(objective, n_trials=self.search.trials)
        # A point counts only if nothing weaker at its layers was outside.
        return [
            point
            for point in inside
            if not self.is_ladder
            or not any(layers == point.layers and self.reach(one) < self.reach(_at(point)) for layers, one in broken)
        ]

    def without_loops(self, inside: Sequence[Point]) -> Point | None:
        """The most effective point whose texts, and those of all weaker strengths, repeat no more than allowed."""
        looping: dict[Any, float] = {}  # the weakest strength known to loop, by its reach
        fine: dict[Any, float] = {}
        for point in sorted(inside, key=lambda point: -self.gain(point).mean):
            reach = self.reach(_at(point))
            ladder = (point.layers, None if self.is_ladder else _at(point))
            if not self.gain(point).low > 0 or reach >= looping.get(ladder, math.inf):
                continue
            below = {_at(other) for other in inside if other.layers == point.layers and self.reach(_at(other)) <= reach}
            for lower in sorted(below, key=self.reach) if self.is_ladder else [_at(point)]:
                if self.reach(lower) <= fine.get(ladder, -math.inf):
                    continue
                self.step(f"texts at layer {_named(point.layers)}, strength {lower:g}")
                scores = self.measure(self.setup, point.layers, lower, self.of_texts)
                if scores is not None:
                    self._remember(point.layers, lower, scores)
                if scores is None or self.budget.breaks(scores):
                    looping[ladder] = self.reach(lower)
                    break
                fine[ladder] = self.reach(lower)
            else:
                return next(one for one in self.points if one.layers == point.layers and one.strength == point.strength)
        return None

    def _remember(self, layers: tuple[int, ...], strength: float, scores: dict[str, Measured]) -> None:
        """Add figures to the point they belong to."""
        for place, point in enumerate(self.points):
            if point.layers == layers and point.strength == strength:
                self.points[place] = replace(point, scores={**point.scores, **scores})

    def confirm(self, best: Point) -> Calibration:
        """Fit on all training items at the chosen layers and measure once on the held-out ones."""
        strength = _at(best)
        self.step("fitting on all items")
        try:
            vector = replace(self.final, layers=best.layers).at(best.layers)
        except FitError as error:  # a method that chooses among its sites may find none on other items
            return self.nothing(f"layers {_named(best.layers)} were best, but on all items the fit fails: {error}")
        neutral = self.kind.neutral
        if neutral is None:  # no strength leaves the model as it is
            strengths = [strength / 2, strength]
        else:
            reach = strength - neutral
            strengths = [neutral - reach, neutral - reach / 2, neutral, neutral + reach / 2, strength]
        self.step("dose-response on held-out items")
        curve = strength_response(
            self.confirming,
            vector,
            sorted(strengths),
            scorers=[self.scorer],
            controls=self.search.controls,
            control_strengths=[strength],
            seed=self.search.seed,
            step=lambda: self.step("dose-response on held-out items"),
        )
        self.step("costs on other texts")
        trial = self.confirming.trial(vector, strength)
        costs = measure(trial, ["divergence", *self.of_texts], seed=self.search.seed)
        confirmed = {**curve.points[curve.strengths.index(strength)], **costs}
        refitted = self.refitted(vector)
        shuffled = self.shuffled(refitted, strength)
        randoms = [control[strength] for control in curve.controls]
        works, verdict = self.verdict(confirmed, [*randoms, *shuffled])
        found = Calibration(
            works=works,
            verdict=verdict,
            vector=None,
            layers=best.layers,
            strength=strength,
            effect=self.effect,
            budget=self.budget,
            points=tuple(self.points),
            chosen=dict(best.scores),
            confirmed=confirmed,
            curve=curve,
            shuffled=tuple(shuffled),
            search=self.search,
            refits={} if refitted is None else refitted.as_json(),
            skipped=self.skipped,
        )
        return replace(found, vector=self.finished(vector, found))

    def refitted(self, vector: SteeringVector) -> Refits | None:
        """The method fitted again on rearranged training items; None for methods fitted on one pair."""
        if takes_pair(self.kind):
            return None
        setup = self.confirming
        return refits(
            setup.model,
            setup.tokenizer,
            self.final.train,
            vector,
            shuffled=self.search.controls,
            seed=self.search.seed,
            batch_size=setup.batch_size,
            chat_template_kwargs=setup.chat_template_kwargs,
        )

    def shuffled(self, refitted: Refits | None, strength: float) -> list[float]:
        """Effects of fits on shuffled labels, rescaled to the vector's own norm."""
        effects = []
        for control in () if refitted is None else refitted.matched():
            self.step("shuffled labels")
            trial = self.confirming.trial(control, strength)
            effects.append(measure(trial, [self.scorer])[self.effect].estimate.mean)
        return effects

    def verdict(self, confirmed: dict[str, Measured], controls: Sequence[float]) -> tuple[bool, str]:
        """Whether the held-out items confirm what was chosen, and the reason."""
        measured = confirmed[self.effect]
        gain, shown = measured.gain, measured.effect
        # On the same items: what items differ in is no doubt about what steering changes in each of them.
        highest = max((measured.gain_of(control) for control in controls), default=math.inf)
        reached = f"{self.effect} changes by {_span(shown)} on {measured.items} held-out items"
        broken = self.budget.breaks(confirmed)
        if not gain.low > 0:
            return False, f"nothing works: {reached}, which may be nothing"
        if gain.low <= highest:
            return False, f"nothing works: {reached}, but a control reaches {highest:.3g}"
        if broken:
            return False, f"not confirmed: {reached}, but {' and '.join(broken)}"
        return True, f"{reached}, clear of {len(controls)} controls and inside the budget"

    def finished(self, vector: SteeringVector, found: Calibration) -> SteeringVector:
        """The vector with the suggestion, its separation on the held-out items, and how both were found."""
        held_out = dict(vector.held_out)
        data = self.held_out.data
        if vector.readout is not None and data is not None:
            setup = self.held_out
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
            suggested_strength=found.strength if found.works else None,
            seed=self.search.seed,
            held_out={**held_out, "calibration": found.as_json()},
        )


def _at(point: Point) -> float:
    return 0.0 if point.strength is None else point.strength


def _named(layers: Sequence[int]) -> str:
    return "+".join(map(str, layers))


def _span(estimate: Estimate) -> str:
    return f"{estimate.mean:.3g} ({estimate.low:.3g} to {estimate.high:.3g})"
