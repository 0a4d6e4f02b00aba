"""One composition per row of a batch, as vectors that each say which rows they act on."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from steerkit.composition.terms import Composition
from steerkit.errors import CompositionError, StrengthError
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Shared", "shared", "vectors_by_row"]

T = TypeVar("T")


@dataclass
class Shared(Generic[T]):
    """A vector of several rows, with the strength that each of them has.

    Attributes:
        key: what tells it from others.
        vector: of the first of its rows.
        strengths: by row.
    """

    key: Hashable
    vector: T
    strengths: dict[int, float | None]


def shared(rows: Iterable[Iterable[tuple[Hashable, T, float | None]]]) -> list[Shared[T]]:
    """Each vector once for all rows that have it; the vectors of each row stay in their order.

    Args:
        rows: of each row its vectors: what tells one from others but for its strength, the vector, the strength.

    Example:
        >>> found = shared([[("a", "A", 1.0), ("b", "B", 1.0)], [], [("b", "B", 2.0), ("a", "A", 3.0)]])
        >>> [(one.key, one.strengths) for one in found]
        [('a', {0: 1.0}), ('b', {0: 1.0, 2: 2.0}), ('a', {2: 3.0})]
    """
    found: list[Shared[T]] = []
    for number, row in enumerate(rows):
        start = 0  # behind the row's own last vector
        for key, vector, strength in row:
            place = next((n for n in range(start, len(found)) if found[n].key == key), len(found))
            if place == len(found):
                found.append(Shared(key, vector, {}))
            found[place].strengths[number] = strength
            start = place + 1
    return found


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
    listed = [_of_row(number, row, known) for number, row in enumerate(rows)]
    found = shared(
        # A vector without a strength takes the suggested one, and one tuple cannot hold that beside numbers.
        [((vector.application, vector.strength is None), vector, _strength(number, vector)) for vector in row]
        for number, row in enumerate(listed)
    )
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


def _strength(number: int, vector: SteeringVector) -> float | None:
    if isinstance(vector.strength, tuple) or vector.rows is not None:
        raise StrengthError(f"row {number}: a vector in a row has one strength, this one has some for several rows")
    return vector.strength


def _vector(one: Shared[SteeringVector], count: int) -> SteeringVector:
    """The vector with its rows, and their strengths where these differ."""
    rows = tuple(number in one.strengths for number in range(count))
    given = set(one.strengths.values())
    if len(given) == 1:
        return replace(one.vector, rows=rows)
    known = {number: strength for number, strength in one.strengths.items() if strength is not None}
    some = next(iter(known.values()))  # for rows it does not act on
    return replace(one.vector, rows=rows, strength=tuple(known.get(number, some) for number in range(count)))
