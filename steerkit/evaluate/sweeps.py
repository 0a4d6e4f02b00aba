"""Sweeps: the same figures at many layers and strengths, kept row by row so that a killed sweep goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steerkit.errors import DataError
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.fits import Fits
from steerkit.evaluate.scorers._base import Scorer
from steerkit.evaluate.scoring import Measured, identity_of, measure, scorer_of
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store import Store
from steerkit.evaluate.store_identity import digest_of, setup_identity
from steerkit.evaluate.trial import Trial
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Point", "measure_point", "sweep", "to_measure"]


@dataclass(frozen=True)
class Point:
    """One place of a sweep.

    Attributes:
        layers: where the vector acts; empty for the unsteered model.
        strength: how strongly, in the vector's unit; None for the unsteered model.
        scores: column name to figure.
        random: the first figure under each of some random directions of the same norm.
    """

    layers: tuple[int, ...]
    strength: float | None
    scores: Mapping[str, Measured]
    random: tuple[float, ...] = ()

    def as_row(self) -> dict[str, Any]:
        """Plain data for JSON."""
        scores = {name: measured.as_row() for name, measured in self.scores.items()}
        return {"layers": list(self.layers), "strength": self.strength, "scores": scores, "random": list(self.random)}


def measure_point(
    setup: Setup,
    vector: SteeringVector | None,
    strength: float | None,
    scorers: Sequence[Scorer],
    *,
    identity: str,
    store: Store,
    seed: int = 0,
    trial: Trial | None = None,
) -> dict[str, Measured]:
    """Measure one trial, or take its figures from the store.

    Args:
        setup: model, tokenizer and items.
        vector: what steers; None measures the unsteered model, behind the setup's system prompt where there is one.
        strength: in the vector's unit.
        scorers: what is measured.
        identity: digest of `setup_identity(setup)`.
        store: where figures are kept.
        seed: fixes the intervals.
        trial: of the vector at the strength, where others are measured beside it; None makes one.
    """
    key = _key(vector, strength, scorers, identity, seed)
    kept = store.get(key)
    if kept is not None:
        columns = {name: column for scorer in scorers for name, column in scorer.columns.items()}
        return {name: Measured.from_row(columns[name], row) for name, row in kept.items()}
    if trial is None:
        trial = setup.baseline if vector is None and setup.system is None else setup.trial(vector, strength)
    found = measure(trial, scorers, seed=seed)
    layers = [] if vector is None else [site.layer for site in vector.sites]
    store.put(key, {name: one.as_row() for name, one in found.items()}, layers=layers, strength=strength)
    return found


def to_measure(
    setup: Setup,
    asked: Sequence[tuple[SteeringVector, float]],
    scorers: Sequence[Scorer],
    *,
    identity: str,
    store: Store,
    seed: int = 0,
) -> list[Trial | None]:
    """Trials that share passes, for `measure_point`; None where the store has the figures.

    Args:
        setup: model, tokenizer and items.
        asked: vectors with their strengths.
        scorers: what will be measured of all of them.
        identity: digest of `setup_identity(setup)`.
        store: where figures are kept.
        seed: fixes the intervals.
    """
    known = [store.get(_key(*one, scorers, identity, seed)) is not None for one in asked]
    trials = iter(setup.trials(one for one, is_known in zip(asked, known, strict=True) if not is_known))
    return [None if is_known else next(trials) for is_known in known]


def _key(vector: SteeringVector | None, strength: float | None, scorers: Any, identity: str, seed: int) -> str:
    """What kept figures are found by: all that they depend on."""
    used = None if vector is None else [repr(vector.application), vector.strength, vector.rows]
    return digest_of([identity, used, strength, [identity_of(scorer) for scorer in scorers], seed])


def sweep(
    setup: Setup,
    fits: Fits,
    candidates: Sequence[Sequence[int]],
    strengths: Sequence[float],
    *,
    scorers: Sequence[str | Scorer] = ("preference_margin", "divergence", "repetition"),
    store: Store | None = None,
    controls: int = 1,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> Iterator[Point]:
    """Measure a method at every set of layers and every strength, the unsteered model first.

    Args:
        setup: model, tokenizer and held-out items.
        fits: the method and what it is fitted on.
        candidates: sets of layers.
        strengths: in the vectors' unit; at the method's neutral strength the unsteered figures are given.
        scorers: what is measured.
        store: figures already there are not measured again; None keeps none.
        controls: random directions beside every point, on which the first scorer runs.
        seed: fixes the random directions and the intervals.
        step: called after each point, for a progress bar.

    Yields:
        The points, in the order of the candidates and of the strengths.

    Raises:
        DataError: no candidates or strengths, or the items lack what a scorer needs.
    """
    if not candidates or not strengths:
        raise DataError(f"sweep: got {len(candidates)} sets of layers and {len(strengths)} strengths; give both")
    chosen, kept = [scorer_of(scorer) for scorer in scorers], Store() if store is None else store
    identity = digest_of(setup_identity(setup))
    common: dict[str, Any] = {"identity": identity, "store": kept, "seed": seed}
    baseline = measure_point(setup, None, None, chosen, **common)
    yield Point((), None, baseline)
    step()
    neutral = fits.method_object.neutral_strength
    for layers in candidates:
        vector = fits.at(layers)
        randoms = [random_like(vector, seed=seed + 1 + number) for number in range(controls)]
        key, steered = tuple(sorted(set(layers))), [one for one in strengths if one != neutral]
        trials = iter(to_measure(setup, [(vector, strength) for strength in steered], chosen, **common))
        pairs = [(one, strength) for strength in steered for one in randoms]
        beside = iter(to_measure(setup, pairs, chosen[:1], **common))
        for strength in strengths:
            if strength == neutral:
                yield Point(key, strength, baseline)
            else:
                scores = measure_point(setup, vector, strength, chosen, trial=next(trials), **common)
                others = [
                    measure_point(setup, one, strength, chosen[:1], trial=next(beside), **common) for one in randoms
                ]
                random = tuple(next(iter(other.values())).estimate.mean for other in others)
                yield Point(key, strength, scores, random)
            step()
