"""Scorers by name, and `measure`: their means over items with intervals, beside those of the unsteered model."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steerkit._support.plugins import Plugins
from steerkit.errors import DataError, near_miss
from steerkit.evaluate.intervals import Estimate, interval
from steerkit.evaluate.scorers._base import Column, Scorer, Weighted
from steerkit.evaluate.store_identity import digest_of
from steerkit.evaluate.trial import Trial
from steerkit.methods._registry import method_of

__all__ = [
    "Measured",
    "column_of",
    "counted",
    "ends",
    "has_gaps",
    "identity_of",
    "measure",
    "scorer_names",
    "scorer_of",
    "scores_of",
]

_SCORERS: Plugins[Scorer] = Plugins("steerkit.evaluate.scorers", "scorer", Scorer)


@dataclass(frozen=True)
class Measured:
    """One figure of one trial.

    Attributes:
        column: what it is.
        estimate: mean over items with its 95 % interval (on the log scale, of exponentials).
        change: mean of the items' paired differences to the unsteered model, with its interval (on the log scale, the
            ratio); nothing but the neutral value for that model itself. None where the scorer compares by itself.
        items: scored items.
        failures: items that could not be scored.
        lost: those of them that could be scored without steering, and that no number stands for: what is said of the
            others is no measure of health.
        wrong_way: share of all items that moved against what the strength's sign asks for, of figures that steering
            means to move; an item that could not be scored counts as such a one. None of other figures, and where
            no sign says what is asked for (a direction that is taken out, angles).
    """

    column: Column
    estimate: Estimate
    change: Estimate | None
    items: int
    failures: int = 0
    lost: int = 0
    wrong_way: float | None = None

    @property
    def effect(self) -> Estimate:
        """What steering did: the change, or where the scorer compares by itself, its estimate."""
        return self.estimate if self.change is None else self.change

    @property
    def gain(self) -> Estimate:
        """The effect counted so that more is better and 0 is none: ratios as logs, negated where less is better."""
        found = self.effect
        if self.column.scale == "log":
            found = Estimate(*map(_log, found))
        elif self.change is None:
            found = Estimate(*(end - self.column.neutral for end in found))
        if self.column.better == "lower":
            found = Estimate(-found.mean, -found.high, -found.low)
        return found

    def gain_of(self, mean: float) -> float:
        """The gain that another vector has, from its mean on the same items.

        Args:
            mean: its `estimate.mean`.
        """
        shown, own = (
            (mean, self.estimate.mean) if self.column.scale == "linear" else (_log(mean), _log(self.estimate.mean))
        )
        return self.gain.mean + (shown - own) * (-1 if self.column.better == "lower" else 1)

    def as_row(self) -> dict[str, Any]:
        """Plain data for JSON; an end that no number bounds is None."""
        low, high = ends(self.estimate)
        row: dict[str, Any] = {
            "mean": self.estimate.mean,
            "low": low,
            "high": high,
            "items": self.items,
            "failures": self.failures,
        }
        if self.lost:
            row["lost"] = self.lost
        if self.change is not None:
            low, high = ends(self.change)
            row |= {"change": self.change.mean, "change_low": low, "change_high": high}
        if self.wrong_way is not None:
            row["wrong_way"] = self.wrong_way
        return row

    @classmethod
    def from_row(cls, column: Column, row: Mapping[str, Any]) -> Measured:
        """Read what `as_row` wrote.

        Args:
            column: what the row is of.
            row: plain data.
        """
        change = _estimate(row, "change", "change_low", "change_high") if "change" in row else None
        estimate, gaps = _estimate(row, "mean", "low", "high"), (row["failures"], row.get("lost", 0))
        return cls(column, estimate, change, row["items"], *gaps, row.get("wrong_way"))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def ends(estimate: Estimate) -> tuple[float | None, float | None]:
    """Both ends of an interval for JSON; None where no number bounds it.

    Args:
        estimate: the estimate.
    """
    low, high = (end if math.isfinite(end) else None for end in (estimate.low, estimate.high))
    return low, high


def _estimate(row: Mapping[str, Any], mean: str, low: str, high: str) -> Estimate:
    lowest, highest = row[low], row[high]
    return Estimate(row[mean], -math.inf if lowest is None else lowest, math.inf if highest is None else highest)


def scorer_names() -> list[str]:
    """Names of all scorers: the shipped files and installed plug-ins of the group `steerkit.evaluate.scorers`."""
    return _SCORERS.names()


def scorer_of(scorer: str | Scorer, settings: Mapping[str, Any] | None = None) -> Scorer:
    """A scorer by name, or as it is.

    Args:
        scorer: a name, or a scorer with its settings.
        settings: where a name was given.

    Raises:
        UnknownNameError: no scorer or setting of that name.
        DataError: settings beside a scorer that has its own.
    """
    if isinstance(scorer, Scorer):
        if settings:
            raise DataError(f"{scorer.name}: give settings to the scorer itself, not beside it")
        return scorer
    return _SCORERS.resolve(scorer).from_settings(settings or {})


def measure(
    trial: Trial, scorers: Sequence[str | Scorer] = ("preference_margin",), *, seed: int = 0
) -> dict[str, Measured]:
    """Score a trial, and the unsteered model on the same items.

    Args:
        trial: the model under steering, or the baseline.
        scorers: names, or scorers with their settings.
        seed: fixes the intervals.

    Returns:
        Column name to figure, in the order of the scorers.

    Raises:
        DataError: the data lacks what a scorer needs, or two scorers have a column of the same name.
    """
    found: dict[str, Measured] = {}
    wish = _wish(trial)
    for scorer in map(scorer_of, scorers):
        scores = scores_of(trial, scorer)
        unsteered = scores
        if trial.baseline is not trial and (not scorer.against_baseline or has_gaps(scores)):
            unsteered = scores_of(trial.baseline, scorer)
        for name, column in scorer.columns.items():
            if name in found:
                raise DataError(f"{scorer.name}: another scorer has a column {name!r} too; leave one of them out")
            measured = _measured(scorer, name, scores[name], unsteered[name], seed)
            if column.steered and wish:
                before = None if scorer.against_baseline else unsteered[name]
                measured = replace(measured, wrong_way=_wrong_way(scores[name], before, wish))
            found[name] = measured
    return found


def _wish(trial: Trial) -> int:
    """1 where the strength asks for more of what is steered, -1 for less, 0 where it asks for nothing."""
    if not trial.vectors:
        return 0
    first = trial.vectors[0]
    given = first.strength if trial.strength is None else trial.strength
    strength = first.suggested_strength if given is None else given
    neutral = method_of(first).neutral_strength
    if neutral is None or first.edit == "project_out" or not isinstance(strength, int | float):
        return 0
    return (strength > neutral) - (strength < neutral)


def _wrong_way(scores: Tensor | Weighted, beside: Tensor | Weighted | None, wish: int) -> float:
    """Share of the items that did not stay, nor moved as wished: those that could not be scored are among them."""
    change = (scores.values if isinstance(scores, Weighted) else scores).double()
    if beside is not None:
        change = change - (beside.values if isinstance(beside, Weighted) else beside).double()
    return float((~(wish * change >= 0)).double().mean())


def column_of(name: str, columns: Mapping[str, Any]) -> str:
    """Check that a column was measured.

    Args:
        name: the column.
        columns: those there are.

    Raises:
        DataError: it is none of them.
    """
    if name not in columns:
        raise DataError(f"no scorer gave {name!r}; {near_miss(name, columns)}")
    return name


def scores_of(trial: Trial, scorer: Scorer) -> Mapping[str, Tensor | Weighted]:
    """The scores of a trial, item by item; those of the baseline model are kept.

    Args:
        trial: the model under steering, or the baseline.
        scorer: with its settings.

    Returns:
        For each of the scorer's columns [n] numbers.

    Raises:
        DataError: the data lacks what the scorer needs.
    """
    kept = trial.setup.scored
    if not trial.is_baseline:
        return scorer.score(trial)
    key = identity_of(scorer)
    if key not in kept:
        kept[key] = scorer.score(trial)
    found: Mapping[str, Tensor | Weighted] = kept[key]
    return found


def identity_of(scorer: Scorer) -> str:
    """Digest of a scorer: its class with its code, and its settings, so that kept scores are used for no other.

    Args:
        scorer: with its settings.
    """
    kind = type(scorer)
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):  # written at a prompt
        code = ""
    settings = {
        name: value
        for name, value in vars(scorer).items()
        if not isinstance(getattr(kind, name, None), functools.cached_property)
    }
    return digest_of([kind.__module__, kind.__qualname__, code, settings])


def has_gaps(scores: Mapping[str, Tensor | Weighted]) -> bool:
    """Whether an item could not be scored.

    Args:
        scores: what a scorer gave, [n] for each column.
    """
    listed = (one.values if isinstance(one, Weighted) else one for one in scores.values())
    return any(bool(torch.isnan(one).any()) for one in listed)


def counted(
    scorer: Scorer, name: str, scores: Tensor | Weighted, unsteered: Tensor | Weighted
) -> tuple[Tensor, Tensor]:
    """One column's values, with the worst one where an item could be scored without steering and not with it.

    Args:
        scorer: whose column it is.
        name: of the column.
        scores: under steering.
        unsteered: of the same items without it.

    Returns:
        Values [n] double, and [n] whether an item is lost: it could be scored without steering, and no number stands
        for it.

    Raises:
        DataError: the scorer gave other items the second time.
    """
    values, before = (
        (one.values if isinstance(one, Weighted) else one).detach().cpu().double() for one in (scores, unsteered)
    )
    if values.shape != before.shape:
        raise DataError(f"{scorer.name}: {len(values)} items under steering and {len(before)} without; give the same")
    lost, worst = torch.isnan(values) & ~torch.isnan(before), scorer.worst(name)
    if worst is None:
        return values, lost
    return torch.where(lost, worst, values), torch.zeros_like(lost)


def _measured(
    scorer: Scorer, name: str, scores: Tensor | Weighted, unsteered: Tensor | Weighted, seed: int
) -> Measured:
    """One column as a figure; `unsteered` is the same object for the unsteered model itself."""
    column, weights = scorer.columns[name], scores.weights if isinstance(scores, Weighted) else None
    values, lost = counted(scorer, name, scores, unsteered)
    common: dict[str, Any] = {"weights": weights, "shares": column.share, "seed": seed}
    estimate, change = interval(values, **common), None
    if unsteered is scores and not scorer.against_baseline:
        change = Estimate(0.0, 0.0, 0.0)
    elif not scorer.against_baseline:
        before = unsteered.values if isinstance(unsteered, Weighted) else unsteered
        change = interval(values, before=before, **common)
    if column.scale == "log":
        estimate, change = estimate.exp(), None if change is None else change.exp()
    if bool(lost.any()):
        estimate, change = _open(estimate, column), None if change is None else _open(change, column)
    failures = int(torch.isnan(values).sum())
    return Measured(column, estimate, change, len(values) - failures, failures, int(lost.sum()))


def _open(found: Estimate, column: Column) -> Estimate:
    """An interval without an end where it is worse: of items that came to nothing, nobody knows how bad they were."""
    return Estimate(
        found.mean,
        found.low if column.better == "lower" else 0.0 if column.scale == "log" else -math.inf,
        found.high if column.better == "higher" else math.inf,
    )
