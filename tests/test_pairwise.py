"""The choice of cells for the default run leaves out no pair of values, and no cell is lost to both runs."""

from __future__ import annotations

import itertools

import pytest

from tests.pairwise import covering, pairs_of, pairwise

PRODUCTS = [
    [("a", "b"), ("c", "d")],
    [("a", "b", "c"), (1, 2), (True, False)],
    [range(5), range(4), range(3), range(2)],
    [range(7), ("only",), range(6)],
]


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("axes", PRODUCTS, ids=lambda axes: "x".join(str(len(axis)) for axis in axes))
def test_every_combination_of_values_is_in_the_choice(axes: list[tuple[object, ...]], strength: int) -> None:
    cells = list(itertools.product(*axes))
    chosen = covering(cells, min(strength, len(axes)))
    assert len(set(chosen)) == len(chosen) <= len(cells)
    for places in itertools.combinations(range(len(axes)), min(strength, len(axes))):
        shown = {tuple(cell[place] for place in places) for cell in chosen}
        assert shown == set(itertools.product(*(axes[place] for place in places)))


def test_the_choice_is_small_and_the_same_every_time() -> None:
    cells = list(itertools.product(range(10), range(8), range(6), range(2)))
    chosen = covering(cells)
    assert 80 <= len(chosen) <= 100
    assert chosen == covering(cells)


def test_what_is_left_of_a_product_is_covered_as_far_as_it_goes() -> None:
    cells = [cell for cell in itertools.product(range(4), range(4), range(2)) if cell[0] != cell[1]]
    shown = set().union(*(pairs_of(cell) for cell in covering(cells)))
    assert shown == set().union(*(pairs_of(cell) for cell in cells))


def test_the_cells_outside_the_choice_are_marked_slow_and_none_is_lost() -> None:
    axes = (("a", "b", "c"), (1, 2, 3), (True, False))
    params = pairwise(*axes, always=[("c", 3, False)])
    assert [param.values for param in params] == list(itertools.product(*axes))
    here = [param.values for param in params if not param.marks]
    assert {*covering(itertools.product(*axes)), ("c", 3, False)} == set(here)
    assert all(param.marks == [pytest.mark.slow] for param in params if param.values not in here)
