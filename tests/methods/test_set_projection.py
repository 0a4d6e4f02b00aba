"""Set-projection against a slow, obvious form: the operator, the fitted coordinates, the strengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.errors import FitError, StrengthError, VectorMismatchError
from steerkit.maths import edits
from steerkit.methods.set_projection import SetProjection
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector
from tests import modes
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

TRAIT = ["what a bright day", "all is well with me, thank you", "yes!"]
CALM = ["what a day", "it is as it is", "perhaps, perhaps not"]
IDS = torch.tensor([modes.LONG])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_setting(h: Tensor, direction: Tensor, target: Sequence[float]) -> Tensor:
    """Token by token in float64: build the coordinate, take it out, put the new one in."""
    u = direction.double() / direction.double().square().sum().sqrt()
    rows = []
    for row, wanted in zip(h.double(), target, strict=True):
        tokens = []
        for token in row:
            along = sum(float(a) * float(b) for a, b in zip(token, u, strict=True))
            tokens.append(token - along * u + wanted * u)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def fitted(model: Any, **settings: Any) -> SteeringVector:
    data = ContrastSet.from_prompts(TRAIT, CALM, raw=True)
    return steerkit.fit(
        model, byte_tokenizer(CHATML), data, method="set_projection", layers=[1], settings=settings, batch_size=2
    )


# the operator


@pytest.mark.parametrize("target", [0.0, 3.0, -2.5])
def test_set_projection_is_the_slow_form(target: float) -> None:
    h, direction = draw(2, 3, 16), 5 * draw(16, seed=1)
    before = h.clone()
    found = edits.set_projection(h, direction, target)
    torch.testing.assert_close(found.double(), slow_setting(h, direction, [target] * 2), rtol=1e-5, atol=1e-5)
    assert torch.equal(h, before)


def test_every_row_can_have_its_own_target() -> None:
    h, direction = draw(3, 4, 16), draw(16, seed=1)
    target = torch.tensor([1.0, -4.0, 0.0])[:, None, None]
    found = edits.set_projection(h, direction, target)
    torch.testing.assert_close(found.double(), slow_setting(h, direction, [1.0, -4.0, 0.0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_setting_twice_is_setting_once(dtype: torch.dtype) -> None:
    """At the width of a 7B model, half of the energy along the direction."""
    direction = 11.0 * draw(3584, seed=1)
    u = direction / direction.norm()
    h = (draw(2, 5, 3584) + 60 * u).to(dtype)
    once = edits.set_projection(h, direction.to(dtype), 7.5)
    twice = edits.set_projection(once, direction.to(dtype), 7.5)
    # What is left to correct is the rounding of the coordinate h . u, a sum whose parts are as large as h.
    moved = torch.linalg.vector_norm(twice - once, dim=-1) / torch.linalg.vector_norm(h, dim=-1)
    assert float(moved.max()) < 4 * torch.finfo(dtype).eps
    assert float(((once.double() @ u.double()) - 7.5).abs().max()) < 1e-5 * 60
    across = h.double() - (h.double() @ u.double())[..., None] * u.double()
    kept = once.double() - (once.double() @ u.double())[..., None] * u.double()
    assert float((kept - across).abs().max()) < 1e-4


def test_in_bfloat16_it_rounds_once() -> None:
    direction = draw(3584, seed=1)
    h = (draw(2, 5, 3584) + 3 * direction / direction.norm()).bfloat16()
    found = edits.set_projection(h, direction, 5.0)
    u = direction.double() / direction.double().norm()
    exact = h.double() + (5.0 - (h.double() @ u)[..., None]) * u
    assert found.dtype == torch.bfloat16
    assert bool(((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(edits.set_projection(h, direction, 5.0), found)
    # Twice is once to the rounding of h itself, which moves the coordinate by far less than one of its steps.
    again = edits.set_projection(found, direction, 5.0)
    assert float((again.float() - found.float()).abs().max() / found.float().abs().max()) < 2**-8


def test_target_zero_is_ablation_and_no_length_is_no_change() -> None:
    h, direction = draw(2, 3, 16), draw(16, seed=1)
    torch.testing.assert_close(edits.set_projection(h, direction, 0.0), edits.project_out(h, direction))
    assert torch.equal(edits.set_projection(h, torch.zeros(16), 4.0), h)


# the method


def test_what_is_fitted_is_where_the_sides_lie() -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    vector = fitted(model)
    sides = []
    for texts in (TRAIT, CALM):
        rows: list[Tensor] = []
        handle = (
            find_decoder(model)
            .blocks[1]
            .register_forward_hook(
                lambda _module, _args, output, rows=rows: rows.append(output[0, -1].double().clone())
            )
        )
        for text in texts:
            logits(model, torch.tensor([tokenizer(text)["input_ids"]]))
        handle.remove()
        sides.append(rows)
    r = sum(sides[0]) / 3 - sum(sides[1]) / 3
    u = r / r.norm()
    params = vector.params(Site(1))
    torch.testing.assert_close(params["direction"].double(), r, rtol=1e-4, atol=1e-5)
    for name, rows in zip(("trait", "other"), sides, strict=True):
        expected = sum(float(row @ u) for row in rows) / 3
        assert float(params[name]) == pytest.approx(expected, abs=1e-5), name
    assert float(params["trait"]) > float(params["other"])


@pytest.mark.parametrize("origin", ["zero", "other"])
@pytest.mark.parametrize("strength", [0.0, 1.0, 1.4, -1.0])
def test_steering_sets_strength_times_the_traits_mean(strength: float, origin: str) -> None:
    model: Any = build("llama")
    vector = fitted(model, origin=origin)
    params = vector.params(Site(1))
    trait, other = float(params["trait"]), float(params["other"])
    target = strength * trait if origin == "zero" else other + strength * (trait - other)

    def by_hand(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return slow_setting(output, params["direction"], [target]).float()

    handle = find_decoder(model).blocks[1].register_forward_hook(by_hand)
    expected = logits(model)
    handle.remove()
    with steerkit.steer(model, vector, strength):
        assert gap(logits(model), expected) < 1e-5
    assert gap(expected, logits(model)) > 1e-4


def test_rows_have_their_own_strength_and_it_can_change() -> None:
    model = build("llama")
    vector = fitted(model)
    ids = torch.tensor([modes.LONG, modes.LONG])
    single = []
    for strength in (0.5, 2.0):
        with steerkit.steer(model, vector, strength):
            single.append(logits(model)[0])
    with steerkit.steer(model, vector, [0.5, 2.0]) as steering:
        found = logits(model, ids)
        steering.strength = [2.0, 0.5]
        swapped = logits(model, ids)
    for row, other in ((0, 1), (1, 0)):
        assert gap(found[row], single[row]) < 1e-5
        assert gap(swapped[other], single[row]) < 1e-5
    assert gap(single[0], single[1]) > 1e-4


def test_two_times_over_is_once() -> None:
    model = build("llama")
    vector = fitted(model)
    with steerkit.steer(model, vector, 1.4):
        once = logits(model)
        with steerkit.steer(model, vector, 1.4):
            assert gap(logits(model), once) < 1e-6


def test_no_strength_is_neutral() -> None:
    assert SetProjection.neutral is None
    model = build("llama")
    baseline = logits(model)
    for strength in (0.0, 1.0):
        with steerkit.steer(model, fitted(model), strength):
            assert gap(logits(model), baseline) > 1e-4


def test_compiled_whole_and_not_again_for_another_strength() -> None:
    torch._dynamo.reset()
    model: Any = build("llama")
    calls: list[int] = []

    def backend(graph: Any, _inputs: Any, **_options: Any) -> Any:
        calls.append(1)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad(), steerkit.steer(model, fitted(build("llama")), 1.0) as steering:
        compiled(IDS)
        before = len(calls)
        for value in (1.0, 0.0, 1.4):
            steering.strength = value
            got = compiled(IDS).logits
            with torch.compiler.set_stance("force_eager"):
                assert gap(got, model(IDS).logits) < 1e-5
    assert len(calls) == before
    torch._dynamo.reset()


def test_a_bfloat16_model_is_steered_in_float32_and_answers_in_its_own() -> None:
    model = build("llama")
    vector = fitted(model)
    half = build("llama").bfloat16()
    with steerkit.steer(half, vector, 1.4):
        found = logits(half)
    assert found.dtype == torch.bfloat16
    with steerkit.steer(model, vector, 1.4):
        assert gap(found.float(), logits(model)) < 0.1


def test_the_control_points_elsewhere_and_aims_as_far() -> None:
    vector = fitted(build("llama"))
    control = SetProjection().control(vector, torch.Generator().manual_seed(2))
    own, other = vector.params(Site(1)), control.params(Site(1))
    assert float(other["direction"].norm()) == pytest.approx(float(own["direction"].norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(own["direction"], other["direction"], dim=0))) < 0.6
    assert torch.equal(own["trait"], other["trait"])


# refusals


def test_a_wrong_origin_is_refused() -> None:
    with pytest.raises(FitError, match="'nowhere'"):
        SetProjection(origin="nowhere")  # type: ignore[arg-type]


def test_equal_sides_are_refused() -> None:
    with pytest.raises(FitError, match="same mean"):
        SetProjection().fit_site(torch.ones(2, 4), torch.ones(3, 4))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"resid_post.1/direction": torch.zeros(32)}, "length 0"),
        ({"resid_post.1/trait": None}, "one number 'trait'"),
        ({"resid_post.1/other": torch.ones(2)}, "one number 'other'"),
    ],
)
def test_tensors_it_cannot_apply_are_refused_when_attached(change: dict[str, Any], match: str) -> None:
    model = build("llama")
    vector = fitted(model)
    tensors = {name: value for name, value in {**vector.tensors, **change}.items() if value is not None}
    with pytest.raises(VectorMismatchError, match=match):
        steerkit.steer(model, replace(vector, tensors=tensors))


def test_there_is_neither_a_length_nor_a_weight_form() -> None:
    model = build("llama")
    vector = fitted(model)
    with pytest.raises(StrengthError, match="has not"):
        steerkit.steer(model, vector, 1.0, unit="norm")
    with pytest.raises(StrengthError, match="no exact weight form"), steerkit.edited(model, vector, 1.0):
        pass
