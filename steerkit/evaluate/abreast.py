"""Trials abreast: several of them in the same passes, each row with the vector and the strength of its own trial.

    row 0   text 0, vector u at 1.0
    row 1   text 0, vector u at 2.0
    row 2   text 0, vector w at 1.5
    row 3   text 1, vector u at 1.0

Every row gets what its trial alone would give it, but for the rounding of sums over more rows. Gates decide row by row
at a cost of their own and run alone, and so does a trial of several vectors, whose order matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from steerkit.composition.rows import vectors_by_row
from steerkit.methods._protocols import editor_of
from steerkit.methods._registry import method_of
from steerkit.steering.edits_at_sites import RowStrengths
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.evaluate.trial import Trial

__all__ = ["ABREAST", "by_row", "can_share", "companions"]

ABREAST = 4
"""So many trials share a pass at most, which then has so many times the rows of `Setup.batch_size`."""


def companions(trial: Trial, *, same_sites: bool) -> list[Trial]:
    """The trials that can share passes with one, itself first.

    Args:
        trial: that is measured now.
        same_sites: only those that write where it does: others would have blocks run that are known.
    """
    if not can_share(trial):
        return [trial]
    found = [trial]
    for other in trial.abreast:
        if other is trial or other.setup is not trial.setup or not can_share(other):
            continue
        (mine,), (its,) = trial.vectors, other.vectors
        if same_sites and set(mine.sites) != set(its.sites):
            continue
        found.append(other)
    return found


def can_share(trial: Trial) -> bool:
    """Whether a trial has one vector, at one strength, that writes every row alike: then others may run beside it.

    Args:
        trial: any; the baseline has none.
    """
    if len(trial.vectors) != 1:
        return False
    (vector,) = trial.vectors
    is_read = vector.when is not None or vector.hold is not None
    return not is_read and not isinstance(vector.strength, tuple) and editor_of(method_of(vector), vector) is None


def by_row(trials: Sequence[Trial]) -> list[SteeringVector]:
    """The vectors of some trials, each of which says which rows it steers.

    Args:
        trials: by row; the baseline steers nothing.
    """
    made = {id(trial): _applied(trial) for trial in trials}
    return vectors_by_row([made[id(trial)] for trial in trials])


def _applied(trial: Trial) -> list[SteeringVector] | None:
    """The vector of a trial as the trial applies it; None for the baseline."""
    return [
        vector.at(
            strength=_strength(trial),
            scope=None if vector.own_scope else trial.scope,
            unit=None if vector.own_unit else trial.unit,
        )
        for vector in trial.vectors
    ] or None


def _strength(trial: Trial) -> float:
    """The one strength of a trial, whoever gave it."""
    (vector,) = trial.vectors
    value = RowStrengths(vector, trial.strength, trial.unit).value
    assert isinstance(value, float)
    return value
