"""What a calibration works on: the split of the items, the layers and strengths to try, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from steerkit.errors import DataError
from steerkit.evaluate.calibration.budget import Budget, Search
from steerkit.evaluate.controls import FEWEST
from steerkit.evaluate.fits import Fits
from steerkit.evaluate.intervals import Estimate, NotScored
from steerkit.evaluate.layer_sets import default_candidates
from steerkit.evaluate.scorers._base import Scorer
from steerkit.evaluate.scoring import Measured, scorer_of
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store import Store
from steerkit.evaluate.store_identity import digest_of, setup_identity
from steerkit.evaluate.sweeps import Point, measure_point, to_measure
from steerkit.methods._base import Method, takes_pair
from steerkit.network.sites import layers_text
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.splitting import warn_of_known_items

__all__ = ["Place", "Problem", "layers_name", "problem_of", "strength_of"]

Place = tuple[tuple[int, ...], float]
"""Layers, and a strength at them."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One calibration, before anything is measured.

    Attributes:
        final: the method on all training items, for what is confirmed.
        fits: the method on the training items that are left beside the validation split, for what is chosen.
        setup: the validation split and half of the neutral texts and prompts.
        confirming: the held-out items and the other half.
        candidates: sets of layers to try.
        ladder: strengths to try, from the weakest on.
        scorer: shows the effect.
        of_texts: read what the model generates.
        budget: what steering may cost.
        search: how it is looked for.
        store: figures already there are not measured again.
        step: called with a few words before each measurement.
    """

    final: Fits
    fits: Fits
    setup: Setup
    confirming: Setup
    candidates: Sequence[tuple[int, ...]]
    ladder: Sequence[float]
    scorer: Scorer
    of_texts: Sequence[Scorer]
    budget: Budget
    search: Search
    store: Store
    step: Callable[[str], None]

    @property
    def held_out(self) -> Setup:
        """The setup as it was given, with all held-out items and neutral texts."""
        return self.final.setup

    @property
    def method(self) -> Method:
        """The method with its settings."""
        return self.final.method_object

    @property
    def effect(self) -> str:
        """The column that shows the effect."""
        return next(iter(self.scorer.columns))

    @cached_property
    def scorers(self) -> list[Scorer]:
        """The scorer of the effect and that of the KL divergence; one where they are the same."""
        return list({scorer.name: scorer for scorer in (self.scorer, scorer_of("divergence"))}.values())

    @cached_property
    def of_costs(self) -> list[Scorer]:
        """The scorer of the KL divergence and the perplexity ratio alone."""
        return [one for one in self.scorers if "kl" in one.columns]

    @cached_property
    def few(self) -> list[Setup]:
        """Parts of the validation split, the smaller first, on which what is clearly behind is told."""
        assert self.setup.data is not None
        items, texts = min(self.search.screened_items, len(self.setup.data)), max(4, self.search.neutral_texts // 2)
        sizes = [items // 2, items] if self.scorer.by_item and items // 2 >= FEWEST else [items]
        return [self.setup.first(size, texts) for size in sizes]

    @cached_property
    def rungs(self) -> list[Setup]:
        """The same, and all of the validation split; that alone where a part of the items costs as much."""
        return [*self.few, self.setup] if self.scorer.by_item else [self.setup]

    @cached_property
    def _identities(self) -> dict[int, str]:
        """Digests of what figures depend on, by setup."""
        return {id(setup): digest_of(setup_identity(setup)) for setup in (*self.few, self.setup)}

    @property
    def is_ladder(self) -> bool:
        """Whether strengths lead away from one that changes nothing, so that one can be weaker than another."""
        return self.method.neutral_strength is not None

    def reach(self, strength: float) -> float:
        """How strong a strength is: its distance from the neutral one.

        Args:
            strength: in the method's own unit.
        """
        return _reach(self.method, strength)

    def gain(self, point: Point) -> Estimate:
        """The effect of a point, counted so that more is better.

        Args:
            point: measured.
        """
        return point.scores[self.effect].gain

    def measure(
        self, setup: Setup, layers: Sequence[int], strength: float, scorers: Sequence[Scorer]
    ) -> dict[str, Measured] | None:
        """Figures of one point, from the store where they are there.

        Args:
            setup: on what is measured.
            layers: where the vector acts.
            strength: how strongly.
            scorers: what is measured.

        Returns:
            Column name to figure; None where the model says nothing finite.
        """
        ((_, found),) = self.measured(setup, [(tuple(layers), strength)], scorers)
        return found

    def measured(
        self,
        setup: Setup,
        places: Sequence[Place],
        scorers: Sequence[Scorer],
        tell: Callable[[Place], None] = lambda place: None,
    ) -> Iterator[tuple[Place, dict[str, Measured] | None]]:
        """Figures of several places, which share passes where they can; see `measure`.

        Args:
            setup: on what is measured.
            places: layers and strengths.
            scorers: what is measured.
            tell: called before each.

        Yields:
            The places, each with its figures.
        """
        common: dict[str, Any] = {
            "identity": self._identities[id(setup)],
            "store": self.store,
            "seed": self.search.seed,
        }
        vectors = [(self.fits.at(layers), strength) for layers, strength in places]
        trials = to_measure(setup, vectors, scorers, **common)
        for place, (vector, strength), trial in zip(places, vectors, trials, strict=True):
            tell(place)
            try:
                found = measure_point(setup, vector, strength, scorers, trial=trial, **common)
            except NotScored:
                yield place, None
            else:
                yield place, found

    def keeps(self, costs: dict[str, Measured], *, surely: bool = False) -> bool | None:
        """Whether costs are inside the budget.

        Args:
            costs: measured.
            surely: with their whole intervals; None then says that these hold the limit.
        """
        return self.budget.holds(costs) if surely else not self.budget.breaks(costs)


def problem_of(
    fits: Fits,
    validation: ContrastSet | None,
    budget: Budget,
    search: Search,
    effect: str | Scorer,
    beside: Sequence[str | Scorer],
    store: Store | None,
    step: Callable[[str], None],
) -> Problem:
    """Split the items, list what is tried, and refuse what cannot be calibrated.

    Args:
        fits: the method on all training items.
        validation: items to choose on; None takes a part of the training items.
        budget: what steering may cost.
        search: how it is looked for.
        effect: the scorer whose first column shows the effect.
        beside: scorers that choose nothing.
        store: figures already there are not measured again; None keeps them in memory.
        step: called with a few words before each measurement.

    Raises:
        DataError: too few items or neutral texts, nothing to try, or strengths on both sides of the neutral one.

    Warns:
        UserWarning: items that choose or confirm ask what is fitted on.
    """
    scorer = scorer_of(effect)
    scorer.check(fits.setup)
    of_texts = [scorer_of(one) for one in ("repetition", *beside)]
    held_out, kind, rest = fits.setup, fits.kind, fits.train
    if validation is None and takes_pair(kind):
        raise DataError(f"calibrate: {kind.name} is fitted on one pair of prompts; give validation items too")
    if validation is None:
        rest, validation = rest.split(held_out=search.validation, seed=search.seed)
    else:
        warn_of_known_items(rest.sides, validation.sides)
    if held_out.data is not None:
        warn_of_known_items(fits.train.sides, held_out.data.sides)
    if not takes_pair(kind) and len(rest) < FEWEST:
        raise DataError(f"calibrate: {len(rest)} items are left to fit on; give at least {FEWEST}")
    if not all(held_out.half(number).calm for number in (0, 1)):
        raise DataError("calibrate: one neutral text cannot both choose and confirm; give at least two")
    first = held_out.half(0)
    setup = replace(first, data=validation, neutral=first.calm[: search.neutral_texts])
    candidates = _candidates(fits, setup, search)
    method = fits.method_object
    ladder = _ladder(method, search)
    if not candidates or not ladder:
        raise DataError("calibrate: there is no set of layers or no strength to try; give some")
    if len({strength > (method.neutral_strength or 0.0) for strength in ladder}) > 1:
        raise DataError(
            f"calibrate: strengths {', '.join(f'{one:g}' for one in ladder)} lie on both sides of neutral; "
            "give those of one side"
        )
    every = sorted({layer for layers in candidates for layer in layers})
    whole = replace(fits, layers=every, rows=True)
    part = whole.part(rest)
    return Problem(
        final=whole if part.whole is whole else replace(fits, rows=True),
        fits=replace(part, setup=setup),
        setup=setup,
        confirming=held_out.half(1),
        candidates=candidates,
        ladder=ladder,
        scorer=scorer,
        of_texts=of_texts,
        budget=budget,
        search=search,
        store=Store() if store is None else store,
        step=step,
    )


def layers_name(layers: Sequence[int]) -> str:
    """A set of layers as progress lines and messages write it: ``8``, ``12+14`` or ``0-29``.

    Args:
        layers: blocks counted from 0.
    """
    return layers_text(sorted(layers))


def strength_of(point: Point) -> float:
    """The strength of a point; 0 of the unsteered model.

    Args:
        point: of a sweep or a search.
    """
    return 0.0 if point.strength is None else point.strength


def _candidates(fits: Fits, setup: Setup, search: Search) -> list[tuple[int, ...]]:
    listed = search.candidates
    if listed is None:
        own = [site.layer for site in fits.method_object.sites(setup.decoder)]
        listed = default_candidates(fits.kind, setup.decoder.num_layers, [own])
    return [tuple(sorted(set(layers))) for layers in listed]


def _ladder(method: Method, search: Search) -> list[float]:
    return sorted(search.strengths or method.ladder, key=lambda strength: _reach(method, strength))


def _reach(method: Method, strength: float) -> float:
    """How far a strength lies from the one that changes nothing."""
    return abs(strength - (method.neutral_strength or 0.0))
