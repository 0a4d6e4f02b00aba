"""A choice of cells out of a product in which every pair of values still meets.

The default run takes such a choice, `make slow` all the others: `pairwise(...)` gives `parametrize` all cells of the
product, in order, and marks those outside the choice as slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import pytest

Cell = tuple[Hashable, ...]


def pairs_of(cell: Cell, strength: int = 2) -> set[tuple[tuple[int, Hashable], ...]]:
    """The combinations of `strength` values that a cell shows, each value with its axis."""
    return set(itertools.combinations(enumerate(cell), strength))


def covering(cells: Iterable[Cell], strength: int = 2) -> list[Cell]:
    """Few cells, found greedily, that show every combination of `strength` values that all of them show.

    Args:
        cells: what there is to choose from, all of one length; not all of a product need be there.
        strength: 2 for every pair of values, 1 for every value.

    Returns:
        The choice, in the order of `cells`; the same for the same cells.
    """
    left = {cell: pairs_of(cell, strength) for cell in cells}
    order = list(left)
    missing = set().union(*left.values())
    chosen: set[Cell] = set()
    while missing:
        best = max(order, key=lambda cell: len(left[cell] & missing))  # the first of the best
        chosen.add(best)
        missing -= left[best]
    return [cell for cell in order if cell in chosen]


def pairwise(
    *axes: Sequence[Any], strength: int = 2, among: Iterable[Cell] | None = None, always: Iterable[Cell] = ()
) -> list[Any]:
    """All cells of a product for `pytest.mark.parametrize`, those outside a covering choice marked slow.

    Args:
        axes: the values of each axis.
        strength: 2 for every pair of values, 1 for every value.
        among: the cells there are, where that is not the whole product.
        always: cells that stay in the default run whatever the choice is.
    """
    cells = list(itertools.product(*axes)) if among is None else list(among)
    chosen = {*covering(cells, strength), *always}
    return [pytest.param(*cell, marks=[] if cell in chosen else [pytest.mark.slow]) for cell in cells]
