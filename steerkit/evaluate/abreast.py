"""Trials abreast: several of them in the same passes, each row with the vector and the strength of its own trial.

    row 0   text 0, vector u at 1.0        u: (1.0, 2.0, 0.0, 1.0, ...)
    row 1   text 0, vector u at 2.0        w: (0.0, 0.0, 1.5, 0.0, ...)
    row 2   text 0, vector w at 1.5
    row 3   text 1, vector u at 1.0

A row at a vector's neutral strength stays as it is, bitwise, so that every row gets what its trial alone would give it,
but for the rounding of sums over more rows. Gates decide row by row at a cost of their own and run alone, and so does a
trial of several vectors, whose order matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from steerkit.methods._protocols import editor_of
from steerkit.methods._registry import method_of, resolve
from steerkit.steering.edits_at_sites import RowStrengths
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.evaluate.trial import Trial

__all__ = ["ABREAST", "by_row", "companions", "takes_baseline"]

ABREAST = 4
"""So many trials share a pass at most, which then has so many times the rows of `Setup.batch_size`."""


def companions(trial: Trial, *, same_sites: bool) -> list[Trial]:
    """The trials that can share passes with one, itself first.

    Args:
        trial: that is measured now.
        same_sites: only those that write where it does: others would have blocks run that are known.
    """
    if not _can_share(trial):
        return [trial]
    found = [trial]
    for other in trial.abreast:
        if other is trial or other.setup is not trial.setup or not _can_share(other):
            continue
        (mine,), (its,) = trial.vectors, other.vectors
        if same_sites and set(mine.sites) != set(its.sites):
            continue
        if (mine is its and _way(trial) == _way(other)) or (_has_neutral(trial) and _has_neutral(other)):
            found.append(other)
    return found


def takes_baseline(trial: Trial) -> bool:
    """Whether rows of the unsteered model can run beside those of a trial.

    Args:
        trial: steered.
    """
    return _can_share(trial) and _has_neutral(trial)


def by_row(trials: Sequence[Trial]) -> list[SteeringVector]:
    """The vectors of some trials, each with one strength per row: its neutral one where the row is another's.

    Args:
        trials: by row; the baseline steers nothing.
    """
    rows: dict[tuple[int, str | None, str | None], dict[int, float]] = {}
    first: dict[tuple[int, str | None, str | None], Trial] = {}
    for row, trial in enumerate(trials):
        for vector in trial.vectors:
            key = (id(vector), *_way(trial))
            first.setdefault(key, trial)
            rows.setdefault(key, {})[row] = _strength(trial)
    found = []
    for kind, given in rows.items():
        (vector,), trial = first[kind].vectors, first[kind]
        neutral = resolve(vector.method).neutral
        strengths = [given[row] if row in given else float(neutral or 0.0) for row in range(len(trials))]
        scope, unit = None if vector.own_scope else trial.scope, None if vector.own_unit else trial.unit
        found.append(vector.at(strength=strengths, scope=scope, unit=unit))
    return found


def _can_share(trial: Trial) -> bool:
    """Whether a trial has one vector, at one strength, that writes every row alike."""
    if len(trial.vectors) != 1:
        return False
    (vector,) = trial.vectors
    is_read = vector.when is not None or vector.hold is not None
    return not is_read and not isinstance(vector.strength, tuple) and editor_of(method_of(vector), vector) is None


def _has_neutral(trial: Trial) -> bool:
    """Whether a row can be left as it is by a strength, whatever that counts in."""
    (vector,) = trial.vectors
    neutral, unit = resolve(vector.method).neutral, None if vector.own_unit else trial.unit
    return neutral == 0 or (neutral is not None and (unit or vector.unit) == "paper")


def _way(trial: Trial) -> tuple[str | None, str | None]:
    return trial.scope, trial.unit


def _strength(trial: Trial) -> float:
    """The one strength of a trial, whoever gave it."""
    (vector,) = trial.vectors
    value = RowStrengths(vector, trial.strength, trial.unit).value
    assert isinstance(value, float)
    return value
