"""Intervals of an effect that resample the fit and the items together.

The usual interval takes the vector as given and asks what other held-out items would have said. But the vector was
fitted on items too, and others would have given another vector. So both are drawn anew (a two-level bootstrap):

    draw k:    fit the method on the training items drawn with replacement, in the vector's own sites and settings
               score the held-out items under that vector:  c_k(item) = steered - unsteered
    interval:  2.5 % and 97.5 % quantiles, over all draws k and draws of items, of the mean of c_k

Items that ask the same are drawn together in the fit. Activations are read once; what takes time is scoring the
held-out items anew under every vector. The mean is that of the draws: a vector of fewer different items is a little
weaker than one of all, so it may lie below the effect of the one fit. Where both intervals are alike, it is the items
that limit what is known; where this one is much wider, it is the fit, and more training items help.

Efron (1979), "Bootstrap methods: another look at the jackknife", Annals of Statistics 7:1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import DataError, FitError
from steerkit.evaluate.controls import read_again
from steerkit.evaluate.intervals import Estimate, NotScored
from steerkit.evaluate.rearranged import RearrangedRows
from steerkit.evaluate.refit_results import estimate_of
from steerkit.evaluate.scorers._base import Column, Scorer, Weighted
from steerkit.evaluate.scoring import counted, ends, measure, scorer_of, scores_of
from steerkit.evaluate.trial import Trial
from steerkit.methods._registry import method_of
from steerkit.prompts.contrast_set import ContrastSet

__all__ = ["RefitInterval", "refit_interval"]

FEWEST = 2


@dataclass(frozen=True)
class RefitInterval:
    """The effect of a method on some items, over fits and items drawn anew.

    Attributes:
        name: the column's.
        column: what it is.
        one_fit: the effect of the vector itself, with the interval that draws items alone.
        together: mean over the draws, with the interval that draws the fit and the items.
        fits: vectors that were fitted.
        skipped: draws that gave no direction, or a model whose outputs could not be scored.
    """

    name: str
    column: Column
    one_fit: Estimate
    together: Estimate
    fits: int
    skipped: int

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        found: dict[str, Any] = {"column": self.name, "fits": self.fits, "skipped": self.skipped}
        for name, one in (("one_fit", self.one_fit), ("fit_and_items", self.together)):
            found[name] = {"mean": one.mean, **dict(zip(("low", "high"), ends(one), strict=True))}
        return found


def refit_interval(
    trial: Trial,
    train: ContrastSet,
    scorer: str | Scorer = "preference_margin",
    *,
    fits: int = 40,
    resamples: int = 100,
    seed: int = 0,
    step: Callable[[str], None] = lambda words: None,
) -> RefitInterval:
    """Fit a trial's vector anew on resampled training items, and score resampled held-out items under each.

    Args:
        trial: one vector at a strength, with the held-out items.
        train: the set the vector was fitted on, without what was held out.
        scorer: whose first column shows the effect.
        fits: draws of the training items; each scores all held-out items once.
        resamples: draws of the held-out items under each fit.
        seed: fixes the draws.
        step: called before each fit with what is done and how long it will take, for a progress line.

    Returns:
        The interval, beside that of the one fit.

    Raises:
        DataError: not one vector, a method that reads no contrast set, other data than the vector was fitted on, too
            few items or draws, or items that lack what the scorer needs.
        NotScored: fewer than two draws could be scored.
    """
    if len(trial.vectors) != 1:
        raise DataError(f"refit_interval: got {len(trial.vectors)} vectors; give a trial of one")
    if fits < FEWEST or resamples < 1:
        raise DataError(f"fits={fits}, resamples={resamples}: give at least {FEWEST} fits and 1 resample")
    (vector,), setup, chosen = trial.vectors, trial.setup, scorer_of(scorer)
    name, column = next(iter(chosen.columns.items()))
    method = method_of(vector)
    if method.readout is None:
        raise DataError(f"{method.name} reads no contrast set, so it cannot be fitted on resampled items")
    step("reading the training items")
    acts, subject, turns = read_again(
        setup.model,
        setup.tokenizer,
        train,
        vector,
        batch_size=setup.batch_size,
        chat_template_kwargs=setup.chat_template_kwargs,
    )
    rows = RearrangedRows(acts, subject, vector, turns)
    drawing, picking = (torch.Generator().manual_seed(2 * seed + kind) for kind in range(2))
    own = measure(trial, [chosen], seed=seed)[name]
    means: list[float] = []
    begun, done = time.monotonic(), 0
    for number in range(fits):
        left = (time.monotonic() - begun) / number * (fits - number) if number else None
        step(f"fit {number + 1} of {fits}" + ("" if left is None else f", about {left:.0f} s left"))
        try:
            again = replace(trial, vector=rows.fit(rows.resampled(drawing)))
            found = _means(_changes(again, chosen, name), resamples, picking)
        except (FitError, NotScored):
            continue
        done += 1
        means += found
    if done < FEWEST:
        raise NotScored(f"{done} of {fits} fits on resampled items could be scored; give more items, or less strength")
    together = estimate_of(means)
    return RefitInterval(
        name=name,
        column=column,
        one_fit=own.effect,
        together=together.exp() if column.scale == "log" else together,
        fits=done,
        skipped=fits - done,
    )


def _changes(trial: Trial, scorer: Scorer, name: str) -> tuple[Tensor, Tensor]:
    """[n] what steering changes in each item, nan where it could not be scored, and [n] how much the item counts."""
    after = scores_of(trial, scorer)[name]
    before = scores_of(trial.baseline, scorer)[name]
    values, lost = counted(scorer, name, after, before)
    if bool(lost.any()):
        raise NotScored(f"{int(lost.sum())} items could be scored without steering and not with it")
    weights = (after.weights if isinstance(after, Weighted) else torch.ones_like(values)).detach().cpu().double()
    if scorer.against_baseline:
        return values, weights
    beside = before.values if isinstance(before, Weighted) else before
    return values - beside.detach().cpu().double(), weights


def _means(changes: tuple[Tensor, Tensor], resamples: int, generator: torch.Generator) -> list[float]:
    """Weighted means of items drawn with replacement, of those that could be scored."""
    values, weights = changes
    kept = ~torch.isnan(values)
    values, weights = values[kept], weights[kept]
    if not len(values) or bool(torch.isinf(values).any()):
        raise NotScored(f"{len(values)} items could be scored, of which at least one has to be, all finite")
    picks = torch.randint(len(values), (resamples, len(values)), generator=generator)
    found: list[float] = ((values * weights)[picks].sum(1) / weights[picks].sum(1)).tolist()
    return found
