"""Blocks compared: where a direction separates held-out items, and what it does there at an equal cost."""

from typing import Any

import pytest
import torch

import steerkit
from steerkit.errors import DataError
from steerkit.evaluate.blocks import (
    Separation,
    best_layer,
    effect_by_block,
    find_layer,
    middle_layers,
    separation_by_block,
)
from steerkit.evaluate.fits import Fits
from steerkit.network.sites import Site
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer


@pytest.fixture(scope="module")
def setup() -> steerkit.Setup:
    return steerkit.Setup(build("llama"), byte_tokenizer(CHATML), pairs(12, 4))


def pairs(first: int, count: int) -> steerkit.ContrastSet:
    """Answers that say yes or no to different questions."""
    numbers = range(first, first + count)
    return steerkit.ContrastSet.from_answers(
        [(f"Is it {number}?", f"Yes, it is {number}.", f"No, not a {number}.") for number in numbers]
    )


def test_it_is_what_a_fit_at_each_block_separates(setup: steerkit.Setup) -> None:
    train, held_out = pairs(0, 8), pairs(12, 4)
    found = separation_by_block(Fits(setup, train, "caa", ()), held_out, [0, 1, 3])
    assert [one.layer for one in found] == [0, 1, 3]
    for one in found:
        vector = steerkit.fit(
            setup.model, setup.tokenizer, train, sites=[Site(one.layer)], held_out=held_out, batch_size=16
        )
        figures = vector.held_out["sites"][f"resid_post.{one.layer}"]
        assert one.auc == pytest.approx(figures["auc"], abs=1e-4)
        assert one.cohens_d == pytest.approx(figures["cohens_d"], abs=2e-3)


def test_the_largest_area_wins_and_of_equal_ones_the_largest_distance() -> None:
    found = [Separation(3, 0.9, 9.0), Separation(4, 1.0, 2.0), Separation(5, 1.0, 3.0)]
    assert best_layer(found) == 5
    assert best_layer(found[:2]) == 4


def test_items_that_choose_are_not_fitted_on(setup: steerkit.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[Any]] = []
    from steerkit.evaluate import blocks

    def watch(fits: Fits, held_out: steerkit.ContrastSet, layers: Any) -> list[Separation]:
        seen.extend([set(fits.train.positive), set(held_out.positive)])
        return separation_by_block(fits, held_out, layers)

    monkeypatch.setattr(blocks, "separation_by_block", watch)
    found = find_layer(setup, pairs(0, 8))
    assert [one.layer for one in found] == middle_layers(4) == [1, 2]
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 8


def test_one_pair_shows_no_block(setup: steerkit.Setup) -> None:
    with pytest.raises(DataError, match="actadd is fitted on one pair"):
        find_layer(setup, pairs(0, 8), "actadd")


def test_effects_are_measured_at_one_cost(setup: steerkit.Setup) -> None:
    fits = Fits(setup, pairs(0, 8), "caa", (1, 2), readout="response_mean")
    found = effect_by_block(fits, [1, 2], texts=1, max_kl=0.1)
    assert [one.layer for one in found] == [1, 2]
    for one in found:
        assert 0.05 <= one.kl <= 0.1
        steered = steerkit.measure(setup.trial(fits.at([one.layer]), one.strength), ["preference_margin"])
        assert one.effect == steered["preference_margin"].effect


def test_middle_layers_are_a_fifth_to_four_fifths() -> None:
    assert middle_layers(30) == list(range(6, 24))
    assert middle_layers(18) == list(range(3, 15))
    assert torch.tensor(middle_layers(1)).tolist() == [0]
