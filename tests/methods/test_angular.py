"""Angular Steering, standard and adaptive, against its reference outputs and against slow, obvious forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.errors import StrengthError
from steerkit.maths import edits
from steerkit.maths.directions import steering_plane
from steerkit.methods.angular import AngularSteering
from steerkit.methods.selective import SelectiveSteering
from steerkit.network.decoder import find_decoder
from tests import modes
from tests.choices import mostly_slow
from tests.families import build
from tests.rotations import (
    DTYPES,
    TOLERANCE,
    arrays,
    bases,
    check_tiny,
    dense_aim,
    facts,
    gap,
    half_in_plane,
    planted,
    sides,
    tiny_vector,
)

NOBODY: Any = None


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FORMS = {"standard": None, "adaptive": 0.0, "adaptive_thr0.5": 0.5}


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *((kind, form) for kind in DTYPES for form in ("standard", "adaptive")),
        *((kind, "adaptive_thr0.5") for kind in ("f32", "f64", "bf16")),
        ("f32", "vllm_standard"),
        ("f32", "vllm_adaptive"),
    ],
)
def test_rotations_are_the_reference_s(kind: str, form: str) -> None:
    name, threshold = f"rot.{kind}.{form}", FORMS[form.removeprefix("vllm_")]
    group = "cal.bf16" if kind == "bf16" else "cal.f32"
    b1, b2 = (arrays()[f"{group}.{axis}"] for axis in ("b1", "b2"))
    h = arrays()["rot.h"].to(DTYPES[kind])
    counted = torch.ones(3, 5, dtype=torch.bool)
    counted[0, 1] = threshold != 0.0  # its projection is rounding noise, so the gate may go either way
    for index, degrees in enumerate(facts()["angles_deg"]):
        got = edits.rotate_to(h, b1, b2, degrees, threshold)
        assert got.dtype == h.dtype
        off = gap(got, arrays()[name][index])[counted]
        assert float(off.max()) < TOLERANCE["rotation_bf16" if kind == "bf16" else "rotation_f32_f64"], degrees


@pytest.mark.parametrize("backend", ["hook", "vllm"])
@pytest.mark.parametrize(("mode", "threshold"), [("mode0", None), ("mode1", 0.0)])
def test_rotations_are_the_first_paper_s(mode: str, threshold: float | None, backend: str) -> None:
    """Its released code takes two directions of any length and makes them orthonormal at use, as is done here."""
    first, second = arrays()["ang.first_direction"], arrays()["ang.second_direction"]
    assert float(first.norm()) > 3
    counted = torch.ones(3, 5, dtype=torch.bool)
    counted[0, 1] = threshold is None
    for index, degrees in enumerate(facts()["angles_deg"]):
        got = edits.rotate_to(arrays()["rot.h"], first, second, degrees, threshold)
        off = gap(got, arrays()[f"ang.{backend}.{mode}"][index])[counted]
        assert float(off.max()) < TOLERANCE["rotation_f32_f64"], degrees


@pytest.mark.parametrize("threshold", [None, 0.0, 0.7])
@pytest.mark.parametrize("degrees", [-30.0, 0.0, 45.0, 180.0, 500.0])
def test_rotation_in_its_slow_form(degrees: float, threshold: float | None) -> None:
    h = draw(2, 6, 12).double()
    b1, b2 = steering_plane(draw(5, 12, seed=1))
    expected = dense_aim(h, b1.double(), b2.double(), degrees, threshold)
    torch.testing.assert_close(edits.rotate_to(h, b1, b2, degrees, threshold), expected, rtol=0, atol=1e-6)
    both = edits.rotate_to(h, b1, b2, torch.tensor([degrees, 10.0])[:, None, None], threshold)
    torch.testing.assert_close(both[0], expected[0], rtol=0, atol=1e-6)
    other = dense_aim(h, b1.double(), b2.double(), 10.0, threshold)
    torch.testing.assert_close(both[1], other[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-4)], ids=str)
def test_norms_stay_here_too(dtype: torch.dtype, limit: float) -> None:
    """The later paper's Proposition 1 says that they do not."""
    method = AngularSteering()
    for name, (b1, b2) in bases(dtype).items():
        h = half_in_plane(b1, b2, dtype)
        before = h.double().norm(dim=-1)
        for degrees in range(0, 360, 30):
            prepared = method.prepare({"direction": b1, "second": b2}, torch.tensor(degrees + 5.0), dtype, h.device)
            for after in (edits.rotate_to(h, b1, b2, float(degrees)), method.edit(h, prepared, NOBODY)):
                off = float((after.to(dtype).double().norm(dim=-1) / before - 1).abs().max())
                assert off <= limit, (name, degrees)


def test_what_sets_it_apart_is_that_tokens_become_one() -> None:
    """Two tokens that differ in their polar angle only: the relative rotation keeps them apart, the absolute one does
    not; and no angle is the identity."""
    b1, b2 = steering_plane(draw(5, 12, seed=1))
    rest = draw(12, seed=2)
    rest = rest - (rest @ b1) * b1 - (rest @ b2) * b2
    angles = [math.radians(degrees) for degrees in (20, 140)]
    h = torch.stack([rest + 3 * (math.cos(angle) * b1 + math.sin(angle) * b2) for angle in angles])
    apart = float((h[0] - h[1]).norm())
    assert apart > 5
    for degrees in (0.0, 75.0):
        one, other = edits.rotate_to(h, b1, b2, degrees)
        assert float((one - other).norm()) < 1e-5
        one, other = edits.rotate_by(h, b1, b2, degrees)
        assert math.isclose(float((one - other).norm()), apart, rel_tol=1e-5)
    assert not torch.allclose(edits.rotate_to(h, b1, b2, 0.0), h)
    assert AngularSteering.neutral is None
    again = edits.rotate_to(edits.rotate_to(h, b1, b2, 75.0), b1, b2, 75.0)
    torch.testing.assert_close(again, edits.rotate_to(h, b1, b2, 75.0), rtol=0, atol=1e-5)


def test_what_is_spared_is_bitwise_what_it_was() -> None:
    """Departs from the reference, which multiplies by a mask: there a steered value that is not finite makes nan."""
    b1, b2 = torch.eye(4)[0], torch.eye(4)[1]
    h = torch.tensor([[[-1.0, math.inf, -0.0, 2.0], [1.0, 1.0, 0.5, 0.0], [0.0, 1.0, -0.0, 3.0]]])
    got = edits.rotate_to(h, b1, b2, 90.0, 0.0)
    for token in (0, 2):  # exactly at the threshold is spared too
        assert torch.equal(got[0, token].view(torch.int32), h[0, token].view(torch.int32))
    torch.testing.assert_close(got[0, 1], torch.tensor([0.0, math.sqrt(2), 0.5, 0.0]), rtol=1e-6, atol=1e-6)
    zero = torch.zeros(1, 1, 4)
    assert torch.equal(edits.rotate_to(zero, b1, b2, 33.0), zero)


@pytest.mark.parametrize("form", ["standard", "adaptive"])
def test_logits_and_tokens_of_the_golden_model(form: str) -> None:
    """At every norm, with the plane that Selective Steering has too."""
    method = AngularSteering(adaptive=form == "adaptive")
    check_tiny(method, form)
    vector, _ = tiny_vector(method)
    assert vector.sites == tuple(sides("tiny").positive)
    assert vector.edit == ("rotate_to_above" if method.adaptive else "rotate_to")
    selective, _ = tiny_vector(SelectiveSteering())
    for name in ("shared/direction", "shared/second"):
        assert torch.equal(vector.tensors[name], selective.tensors[name])


def test_the_threshold_is_a_setting() -> None:
    h = draw(1, 40, 8)
    params = {"direction": torch.eye(8)[0], "second": torch.eye(8)[1]}
    for threshold in (0.0, 0.5, 1.5):
        method = AngularSteering(adaptive=True, threshold=threshold)
        got = method.edit(h, method.prepare(params, torch.tensor(120.0), h.dtype, h.device), NOBODY)
        spared = (got == h).all(dim=-1)[0]
        assert spared.tolist() == [float(token[0]) <= threshold for token in h[0]]
        assert 0 < int(spared.sum()) < 40


def test_the_fit_tells_where_the_sides_lie() -> None:
    acts = sides("tiny")
    method = AngularSteering()
    tensors = method.fit(acts, NOBODY, list(acts.positive))
    b1 = tensors["shared/direction"]
    directed = []
    for site in acts.positive:
        plus, minus = tensors[f"{site}/projections"].tolist()
        for got, rows in ((plus, acts.positive[site]), (minus, acts.negative[site])):
            slow = sum(float(row @ b1) for row in rows) / len(rows)
            assert math.isclose(got, slow, rel_tol=1e-4, abs_tol=1e-5)
        found = method.direction({"direction": b1, "projections": tensors[f"{site}/projections"]})
        assert (found is not None) is (plus > minus)
        directed.append(found is not None)
    assert any(directed)


def test_there_is_no_weight_form_and_no_unit_of_norms() -> None:
    model = build("llama")
    vector = planted(model, AngularSteering())
    with pytest.raises(StrengthError, match="no exact weight form"), steerkit.edited(model, vector, 30.0):
        pass
    with pytest.raises(StrengthError, match="length"), steerkit.steer(model, vector, 1.0, unit="norm"):
        pass
    control = AngularSteering().control(vector, torch.Generator().manual_seed(1))
    assert control.sites == vector.sites
    assert float((control.tensors["shared/direction"] @ vector.tensors["shared/direction"]).abs()) < 0.6
    assert AngularSteering().sites(find_decoder(model)) == list(vector.sites)


@pytest.mark.parametrize("adaptive", mostly_slow([False, True], [True]))
def test_fullgraph_equals_eager_and_a_new_angle_compiles_nothing(adaptive: bool) -> None:
    torch._dynamo.reset()
    model = build("llama")
    vector = planted(model, AngularSteering(adaptive=adaptive))
    ids = torch.tensor([modes.LONG, modes.LONG[::-1]])
    calls: list[int] = []

    def backend(graph: Any, _inputs: Any, **_options: Any) -> Any:
        calls.append(1)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        baseline = model(ids).logits
        for values in ([30.0, 0.0, -90.0], [[30.0, 0.0], [200.0, 75.0]]):
            with steerkit.steer(model, vector, values[0]) as steering:
                compiled(ids)
                before = len(calls)
                for value in values:
                    steering.strength = value  # type: ignore[assignment]
                    got = compiled(ids).logits
                    with torch.compiler.set_stance("force_eager"):
                        expected = model(ids).logits
                    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
                    assert not torch.allclose(expected, baseline)
                assert len(calls) == before
    torch._dynamo.reset()
