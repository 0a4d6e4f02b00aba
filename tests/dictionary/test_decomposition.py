"""A vector as a sum of latents: planted sums come back, every bound holds, and random directions stand beside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steerkit.dictionary import Dictionary
from steerkit.dictionary.decomposition import decompose
from steerkit.errors import FitError, VectorMismatchError
from steerkit.network.sites import Site
from tests.dictionary.made import made


def rows_of(dictionary: Dictionary) -> Tensor:
    return dictionary.decoder / dictionary.input_scale


def test_a_planted_sum_comes_back_in_the_models_own_units() -> None:
    dictionary = made("relu", width=64, latents=40, input_scale=0.25)
    rows = rows_of(dictionary)
    vector = 3.0 * rows[7] + 1.5 * rows[22] + 0.5 * rows[3]
    found = decompose(vector, dictionary)
    assert found.latents[:2] == (7, 22)
    weights = dict(zip(found.latents, found.weights.tolist(), strict=True))
    assert {latent: weights[latent] for latent in (7, 22, 3)} == pytest.approx({7: 3.0, 22: 1.5, 3: 0.5}, rel=1e-4)
    assert sum(weights.values()) == pytest.approx(5.0, rel=1e-3)  # nothing else has any
    assert found.explained == pytest.approx(1.0, abs=1e-6)
    assert float(found.left.abs().max()) < 1e-4


@pytest.mark.parametrize("most", [1, 2, 5, 40])
def test_the_bound_holds_and_more_latents_explain_more(most: int) -> None:
    dictionary = made("topk", width=16, latents=40)
    rows = rows_of(dictionary)
    vector = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    found = decompose(vector, dictionary, most=most, random=3)
    assert len(found.latents) == len(set(found.latents)) <= most
    assert bool((found.weights > 0).all())
    assert torch.allclose(found.weights @ rows[list(found.latents)] + found.left, vector, atol=1e-5)
    left = 1 - float(found.left.square().sum() / vector.square().sum())
    assert found.explained == pytest.approx(left, abs=1e-5)
    # Weights are the best that are not negative: nothing is gained along any latent that is in.
    assert float((rows[list(found.latents)] @ found.left).abs().max()) < 1e-3
    if most > 1:
        assert found.explained >= decompose(vector, dictionary, most=most - 1, random=1).explained - 1e-6
    assert len(found.random) == 3
    # Of one latent the best single one is taken.
    if most == 1:
        cosines = torch.cosine_similarity(rows, vector[None], dim=1)
        assert found.explained == pytest.approx(float(cosines.max()) ** 2, rel=1e-4)


def test_a_vector_against_every_latent_has_no_parts() -> None:
    rows = torch.eye(3, dtype=torch.float32)
    zeros = torch.zeros(3, dtype=torch.float32)
    dictionary = Dictionary(rows, rows, zeros, zeros, "relu", Site(0))
    found = decompose(-torch.ones(3, dtype=torch.float32), dictionary, random=1)
    assert (found.latents, found.explained) == ((), 0.0)
    assert found.left.tolist() == [-1.0, -1.0, -1.0]
    assert found.as_json()["latents"] == []


def test_what_is_refused() -> None:
    dictionary = made("relu", width=8)
    vector = torch.ones(8, dtype=torch.float32)
    with pytest.raises(VectorMismatchError, match="has width 8"):
        decompose(torch.ones(9, dtype=torch.float32), dictionary)
    for given, most in ((0 * vector, 4), (vector / 0, 4), (vector, 0)):
        with pytest.raises(FitError):
            decompose(given, dictionary, most=most)
