"""What a projection sees of a direction: W v_null = 0, and a model under it says what it said before."""

from __future__ import annotations

import warnings

import pytest
import torch

import steerkit
from steerkit.network.decoder import find_decoder
from steerkit.network.kernel_share import projection, seen_part, seen_shares
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector
from tests.families import BLOCKS, HIDDEN, build
from tests.tiny_tokenizers import CHATML, byte_tokenizer


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(5, 9, 5), (9, 5, 5), (6, 9, 3), (9, 6, 3), (5, 5, 5)])
def test_it_is_the_projection_by_the_pseudoinverse(rows: int, columns: int, rank: int) -> None:
    matrix = (draw(rows, rank, seed=1) @ draw(rank, columns, seed=2)).float()
    directions = draw(4, columns, seed=3)
    slow = directions.double() @ torch.linalg.pinv(matrix.double(), rtol=1e-6) @ matrix.double()
    found = seen_part(matrix, directions)
    assert torch.allclose(found, slow, atol=1e-5)
    assert float((matrix.double() @ (directions.double() - found).T).abs().max()) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nothing_moves_along_what_is_not_seen(family: str) -> None:
    model, site = build(family), Site(1, "mlp_post")
    matrix = projection(find_decoder(model), site).weight(torch.float32)
    whole = draw(matrix.shape[1])
    dormant = whole - seen_part(matrix, whole).float()
    assert float((matrix.double() @ dormant.double()).abs().max()) <= 1e-6 * float(dormant.norm())
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        plain = model(ids).logits
        logits = []
        for direction in (whole, whole - dormant, dormant):
            with steerkit.steer(model, at(site, direction, family), 1.0, scope="all"):
                logits.append(model(ids).logits)
    assert float((logits[2] - plain).abs().max()) <= 1e-6 * float(plain.abs().max())
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert float((logits[0] - plain).abs().max()) > 1e-2


def at(site: Site, direction: torch.Tensor, family: str) -> SteeringVector:
    return SteeringVector(
        method="caa",
        tensors={f"{site}/direction": direction},
        sites=(site,),
        edit="add",
        scope="all",
        unit="paper",
        widths={site: len(direction)},
        model_type=family,
        hidden_size=HIDDEN,
        num_layers=BLOCKS,
    )


def test_shares_are_of_heads_and_neurons_alone() -> None:
    decoder = find_decoder(build("llama"))
    directions = {Site(1): draw(32), Site(1, "z"): draw(32), Site(1, "mlp_post"): draw(48)}
    found = seen_shares(decoder, directions)
    assert list(found) == [Site(1, "z"), Site(1, "mlp_post")]
    assert found[Site(1, "z")] == pytest.approx(1.0)  # a square matrix of full rank
    assert 0.4 < found[Site(1, "mlp_post")] < 0.9  # 32 of 48 dimensions are seen
    assert seen_shares(find_decoder(build("mixtral")), {Site(1, "z"): draw(32)})


def data() -> steerkit.ContrastSet:
    return steerkit.ContrastSet.from_answers([(f"Is it {n}?", f"Yes, it is {n}.", f"No, not a {n}.") for n in range(8)])


def test_an_edit_that_reads_what_is_not_seen_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    monkeypatch.setattr("steerkit.fitting.fitting._HALF", 0.999)
    with pytest.warns(UserWarning, match=r"set_projection at mlp_post.1: the projection behind it sees \d+%"):
        vector = steerkit.fit(model, tokenizer, data(), method="set_projection", sites=["mlp_post.1"])
    share = vector.describe()["sites"][0]["seen_share"]
    assert share == pytest.approx(
        seen_shares(find_decoder(model), {Site(1, "mlp_post"): direction(vector)}).popitem()[1], abs=1e-4
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steerkit.fit(model, tokenizer, data(), method="caa", sites=["mlp_post.1"])  # what is added is not read
        plain = steerkit.fit(model, tokenizer, data(), method="set_projection", sites=["resid_post.1"])
    assert plain.describe()["sites"][0]["seen_share"] is None


def direction(vector: SteeringVector) -> torch.Tensor:
    return vector.params(vector.sites[0])["direction"]
