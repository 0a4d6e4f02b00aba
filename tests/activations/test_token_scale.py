"""How long activations are: the median norm, what a step along a direction is measured in, and massive dimensions."""

import math

import pytest
import torch

from steerkit.activations.token_scale import TokenScale, TokenScales
from steerkit.network.sites import Site
from tests.families import HIDDEN, build
from tests.tiny_tokenizers import byte_tokenizer


def batch(seed: int, rows: int = 3, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [b, t, 6] far from zero in one dimension, and which tokens count; what does not is nan."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, width, 6, generator=generator) * torch.tensor([1.0, 0.2, 3.0, 1.0, 1.0, 2.0])
    h[..., 2] += 400.0
    counted = torch.ones(rows, width)
    counted[:, 0] = 0.0
    counted[0, -2:] = 0.0
    h[counted == 0] = math.nan
    return h, counted


def by_hand(parts: list[tuple[torch.Tensor, torch.Tensor]], direction: torch.Tensor) -> float:
    """The spread, written out token by token in float64."""
    tokens = [
        h[row, place].double().tolist()
        for h, counted in parts
        for row in range(h.shape[0])
        for place in range(h.shape[1])
        if counted[row, place] > 0
    ]
    size = len(tokens[0])
    means = [sum(token[j] for token in tokens) / len(tokens) for j in range(size)]
    deviation = [math.sqrt(sum((token[j] - means[j]) ** 2 for token in tokens) / len(tokens)) for j in range(size)]
    length = math.sqrt(sum(float(one) ** 2 for one in direction))
    common = math.sqrt(sum(one**2 for one in deviation))
    own = math.sqrt(size) / math.sqrt(sum((float(direction[j]) / length / deviation[j]) ** 2 for j in range(size)))
    return math.sqrt(common * own)


@pytest.mark.parametrize("direction", [[1.0, 0, 0, 0, 0, 0], [0, 2.0, 0, 0, 0, 0], [0.3, -1.0, 2.0, 0.5, 0.1, -0.7]])
def test_the_spread_is_the_formula_over_all_tokens_that_count(direction: list[float]) -> None:
    parts = [batch(0), batch(1, rows=1), batch(2, width=4)]
    scales = TokenScales()
    for h, counted in parts:
        scales.update(h, counted)
    along = torch.tensor(direction)
    assert scales.result().spread(along) == pytest.approx(by_hand(parts, along), rel=1e-5)
    assert scales.result().spread(7 * along) == pytest.approx(by_hand(parts, along), rel=1e-5)


def test_a_quiet_dimension_gives_a_shorter_step_than_a_loud_one() -> None:
    scales = TokenScales()
    scales.update(*batch(0))
    quiet, loud = (scales.result().spread(torch.eye(6)[place]) for place in (1, 2))
    assert quiet < 0.4 * loud


def test_massive_dimensions_are_told_with_their_share() -> None:
    scales = TokenScales()
    scales.update(*batch(0))
    assert set(scales.result().massive) == {2}
    assert scales.result().massive[2] > 0.99
    plain = TokenScales()
    plain.update(torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0)), torch.ones(2, 50))
    assert plain.result().massive == {}


def test_a_dimension_that_never_changes_does_not_make_the_step_nothing() -> None:
    deviation = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert TokenScale(1.0, deviation, {}).spread(torch.tensor([0.0, 1.0, 0.0, 0.0])) > 0


def test_several_directions_count_together() -> None:
    deviation = torch.tensor([1.0, 4.0])
    both = TokenScale(1.0, deviation, {}).spread(torch.eye(2))
    middle = TokenScale(1.0, deviation, {}).spread(torch.tensor([1.0, 1.0]))
    assert both == pytest.approx(middle)


def test_nothing_counted_and_nothing_spread_are_not_a_number() -> None:
    assert math.isnan(TokenScales().result().spread(torch.ones(1)))
    scales = TokenScales()
    scales.update(torch.ones(1, 4, 3), torch.ones(1, 4))
    assert math.isnan(scales.result().spread(torch.ones(3)))


def test_half_precision_and_autocast_give_the_same() -> None:
    h, counted = batch(0)
    h = h.bfloat16()
    single, half = TokenScales(), TokenScales()
    single.update(h.float(), counted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half.update(h, counted)
    assert torch.equal(single.result().deviation, half.result().deviation)


def test_reading_a_model_gives_the_scale_of_every_site() -> None:
    import steerkit

    model = build("llama")
    acts = steerkit.record(model, byte_tokenizer(), ["one two three", "four"], ["resid_post.1"])
    scale = acts.scales[Site(1)]
    assert scale.deviation.shape == (HIDDEN,)
    assert acts.norms == {Site(1): scale.norm}
