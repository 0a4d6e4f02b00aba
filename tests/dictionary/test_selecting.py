"""Gaps between two sides, what chance does with many latents, and SAIF's rule."""

from __future__ import annotations

from math import comb

import pytest
import torch
from torch import Tensor

from steerkit.dictionary.selecting import activation_gap, corrected, saif_amounts, saif_sensitivity
from steerkit.errors import DataError


def latents(rows: int, seed: int, count: int = 30) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, count, generator=draw) - 0.5).relu()


def slow_fisher(on: int, off: int, positives: int, negatives: int) -> float:
    """Two-sided: of all tables with these margins, those that are no likelier than this one."""
    total = on + off
    ways = {
        one: comb(positives, one) * comb(negatives, total - one)
        for one in range(max(0, total - negatives), min(positives, total) + 1)
    }
    return sum(way for way in ways.values() if way <= ways[on] * (1 + 1e-9)) / sum(ways.values())


def test_gaps_are_counted_latent_by_latent() -> None:
    positive, negative = latents(9, 0), latents(7, 1)
    positive[:, 4] = 1.0
    negative[:, 4] = 1.0
    positive[:, 5] = negative[:, 5] = 0.0
    found = activation_gap(positive, negative)
    tested = 0
    for latent in range(30):
        on, off = int((positive[:, latent] > 0).sum()), int((negative[:, latent] > 0).sum())
        tested += 0 < on + off < 16
        assert float(found.share_gap[latent]) == pytest.approx(on / 9 - off / 7, abs=1e-12)
        mean = sum(positive[:, latent].double().tolist()) / 9 - sum(negative[:, latent].double().tolist()) / 7
        assert float(found.mean_gap[latent]) == pytest.approx(mean, abs=1e-9)
        assert float(found.p[latent]) == pytest.approx(slow_fisher(on, off, 9, 7), abs=1e-9)
    assert found.tested == tested == 28
    assert float(found.q[4]) == float(found.q[5]) == 1.0
    order = found.order()
    keys = [(-float(found.share_gap[one]), -float(found.mean_gap[one]), one) for one in order]
    assert keys == sorted(keys)


def test_a_latent_of_one_side_is_found_and_noise_is_not() -> None:
    positive, negative = latents(40, 2, count=500), latents(40, 3, count=500)
    positive[:, 123] += 1.0
    negative[:, 123] = 0.0
    found = activation_gap(positive, negative)
    assert found.order()[0] == 123
    assert float(found.q[123]) < 1e-10
    others = torch.arange(500) != 123
    assert int((found.p[others] < 0.05).sum()) > 3  # by luck
    assert float(found.q[others].min()) > 0.05


def test_corrections_are_the_published_ones() -> None:
    p = torch.tensor([0.01, 0.04, 0.03, 0.5, 0.02], dtype=torch.float64)
    tested = torch.tensor([True, True, True, False, True])
    values = [0.01, 0.02, 0.03, 0.04]
    bh = [min(values[j] * 4 / (j + 1) for j in range(i, 4)) for i in range(4)]
    holm = [max(values[j] * (4 - j) for j in range(i + 1)) for i in range(4)]
    places = {0: 0, 4: 1, 2: 2, 1: 3}
    for name, expected in (("benjamini-hochberg", bh), ("holm", holm)):
        found = corrected(p, tested, name)  # type: ignore[arg-type]
        assert float(found[3]) == 1.0
        for place, rank in places.items():
            assert float(found[place]) == pytest.approx(expected[rank])
    assert corrected(p, torch.zeros(5, dtype=torch.bool), "holm").tolist() == [1.0] * 5


def test_saif_takes_what_fires_with_the_instruction_alone() -> None:
    with_it = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [2.0, 4.0, 5.0]])
    without = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert saif_sensitivity(with_it, without).tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    (first, last) = saif_amounts(with_it, [0, 2], beta=-0.5)
    assert first == pytest.approx(2.0 - 0.5 * (2 / 3) ** 0.5)
    assert last == pytest.approx(5 / 3 - 0.5 * (50 / 9) ** 0.5)
    with pytest.raises(DataError, match="give pairs"):
        saif_sensitivity(with_it, without[:2])
    with pytest.raises(DataError, match="no text"):
        activation_gap(with_it, without[:0])
