"""One composition per row of a batch, as vectors that each say which rows they act on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from steerkit.composition.terms import Composition
from steerkit.errors import CompositionError, StrengthError
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["vectors_by_row"]


@dataclass
class _Shared:
    """A vector of several rows, with the strength that each of them has."""

    key: tuple[Any, ...]
    vector: SteeringVector
    strengths: dict[int, float | None]


def vectors_by_row(rows: Sequence[Any]) -> list[SteeringVector]:
    """The vectors of a batch whose rows are steered differently.

    Args:
        rows: for each row a composition, its text, a list of vectors, or None for an unsteered row.

    Returns:
        Each vector once for all rows that have it, with `rows` set; the vectors of each row stay in their order.

    Raises:
        CompositionError: a row is something else, or no row is steered.
        StrengthError: a vector in a row has strengths per row itself.
        SteerError: a composition that is none, or whose vectors cannot be had.
    """
    known: dict[str, list[SteeringVector]] = {}
    found: list[_Shared] = []
    for number, row in enumerate(rows):
        place = 0
        for vector in _of_row(number, row, known):
            place = _place(found, vector, place)
            found[place].strengths[number] = _strength(number, vector)
            place += 1
    if not found:
        raise CompositionError(f"got {len(rows)} rows and none of them is steered; give at least one composition")
    return [_vector(one, len(rows)) for one in found]


def _of_row(number: int, row: Any, known: dict[str, list[SteeringVector]]) -> list[SteeringVector]:
    """The vectors of one row."""
    if row is None:
        return []
    if isinstance(row, str | Composition):
        text = str(row)
        if text not in known:
            known[text] = Composition.parse(row).vectors()
        return known[text]
    if isinstance(row, list | tuple) and all(isinstance(one, SteeringVector) for one in row):
        return list(row)
    raise CompositionError(
        f"row {number}: got {repr(row)[:60]}; give a composition or its text, a list of vectors, or None"
    )


def _place(found: list[_Shared], vector: SteeringVector, start: int) -> int:
    """Where a vector stands among those of earlier rows, behind the row's own last one; at the end where it is new."""
    applied = (vector.scope, vector.own_scope, vector.unit, vector.own_unit, vector.strength is None)
    key = (vector.digest, *applied, vector.fade, vector.when, vector.hold)
    place = next((n for n in range(start, len(found)) if found[n].key == key), None)
    if place is not None:
        return place
    found.append(_Shared(key, vector, {}))
    return len(found) - 1


def _strength(number: int, vector: SteeringVector) -> float | None:
    if isinstance(vector.strength, tuple) or vector.rows is not None:
        raise StrengthError(f"row {number}: a vector in a row has one strength, this one has some for several rows")
    return vector.strength


def _vector(shared: _Shared, count: int) -> SteeringVector:
    """The vector with its rows, and their strengths where these differ."""
    rows = tuple(number in shared.strengths for number in range(count))
    given = set(shared.strengths.values())
    if len(given) == 1:
        return replace(shared.vector, rows=rows)
    known = {number: strength for number, strength in shared.strengths.items() if strength is not None}
    some = next(iter(known.values()))  # for rows it does not act on
    return replace(shared.vector, rows=rows, strength=tuple(known.get(number, some) for number in range(count)))
