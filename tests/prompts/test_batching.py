"""How texts are parted into passes: as few as can be, or as many as make columns fewest."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from steerkit.prompts.batching import _PASS, batches, parted
from steerkit.prompts.rendering import Rendered

CPU = torch.device("cpu")


def columns(widths: list[int], passes: list[range]) -> int:
    """What passes cost, each as wide as its first row."""
    return sum(_PASS + len(rows) * widths[rows.start] for rows in passes)


def every_way(count: int, largest: int) -> list[list[range]]:
    """All ways to part so many rows."""
    found = []
    for cuts in itertools.product((False, True), repeat=count - 1):
        ends = [place + 1 for place, is_cut in enumerate(cuts) if is_cut] + [count]
        passes = [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        if all(len(rows) <= largest for rows in passes):
            found.append(passes)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_no_other_way_has_fewer_columns(seed: int) -> None:
    dice = random.Random(seed)
    widths = sorted((dice.randint(1, 80) for _ in range(dice.randint(1, 9))), reverse=True)
    largest = dice.randint(1, 9)
    found = parted(widths, largest, CPU)
    assert [row for rows in found for row in rows] == list(range(len(widths)))
    assert max(map(len, found)) <= largest
    assert columns(widths, found) == min(columns(widths, ways) for ways in every_way(len(widths), largest))


def test_elsewhere_passes_are_as_few_as_can_be() -> None:
    for device in (None, torch.device("cuda"), torch.device("mps")):
        assert parted([90, 9, 8, 7, 6], 2, device) == [range(2), range(2, 4), range(4, 5)]
    assert parted([], 2) == parted([], 2, CPU) == []


def test_batches_are_parted_where_lengths_jump() -> None:
    texts = [Rendered("", tuple(range(1, length + 1)), 1, ()) for length in (5, 90, 6, 88)]
    assert [batch.input_ids.shape for batch in batches(texts, 4, pad_id=0)] == [(4, 90)]
    found = batches(texts, 4, pad_id=0, device=CPU)
    assert [(batch.rows, batch.input_ids.shape) for batch in found] == [((1, 3), (2, 90)), ((2, 0), (2, 6))]
    two = batches(texts, 4, pad_id=0, groups=2, device=CPU)  # neighbours stay together
    assert [batch.rows for batch in two] == [(0, 1, 2, 3)]


def test_rows_are_repeated_one_after_the_other() -> None:
    (batch,) = batches([Rendered("", (3, 4, 5), 2, ()), Rendered("", (6, 7), 1, ())], 2, pad_id=0, side="left")
    found = batch.repeated(2)
    assert found.rows == (0, 1, 2, 3)
    assert found.input_ids.tolist() == [[3, 4, 5], [3, 4, 5], [0, 6, 7], [0, 6, 7]]
    assert found.prompt_lengths.tolist() == [2, 2, 1, 1]
    assert [part.rows for part in found.parts(2)] == [(0, 1), (2, 3)]
