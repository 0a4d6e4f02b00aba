"""The edits as numbers do what the methods' own edits do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steerkit.maths.rank_two import displacement, features, leads, offsets
from steerkit.methods import _registry as registry
from steerkit.methods._protocols import HasRankTwoForm

WIDTH = 48
SETTINGS: dict[str, dict[str, Any]] = {
    "set_projection": {"origin": "other"},
    "angular": {"adaptive": True, "threshold": 0.5},
}
WITH_FORM = [name for name in registry.method_names() if isinstance(registry.resolve(name)(), HasRankTwoForm)]


def params() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    axes = torch.randn(2, WIDTH, generator=draw)
    return {"direction": axes[0] * 3, "second": axes[1], "trait": torch.tensor(4.0), "other": torch.tensor(-1.5)}


def test_all_edits_in_a_plane_have_a_form() -> None:
    missing = set(registry.method_names()) - set(WITH_FORM)
    assert missing == {"actadd", "aura", "austeer", "experts", "steer2edit", "transport"}


@pytest.mark.parametrize("strength", [0.0, 1.0, -0.7, 45.0, 360.0, 505.0])
@pytest.mark.parametrize("set_up", [False, True], ids=["defaults", "settings"])
@pytest.mark.parametrize("name", WITH_FORM)
def test_the_form_is_the_edit(name: str, set_up: bool, strength: float) -> None:
    method: Any = registry.resolve(name)(**(SETTINGS.get(name, {}) if set_up else {}))
    h = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    value = torch.tensor(strength)
    wanted = method.edit(h, method.prepare(params(), value, h.dtype, h.device), None)
    form = method.rank_two(params())
    lead = leads(form.weights, features(value))
    by, reached = displacement(h, *form.basis, offsets(form), lead, torch.tensor(form.threshold))
    found = torch.where(reached[..., None], h + by, h)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5 * max(1.0, abs(strength) / 45))
    if method.is_neutral(strength):
        assert torch.equal(found, h)


def test_tokens_have_edits_of_their_own() -> None:
    methods = [registry.resolve(name)() for name in ("caa", "ablation", "selective")]
    forms = [method.rank_two(params()) for method in methods]  # type: ignore[attr-defined]
    h = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))
    strengths = torch.tensor([2.0, 1.0, 70.0])
    basis = torch.stack([form.basis for form in forms])
    by, _ = displacement(
        h,
        basis[:, 0],
        basis[:, 1],
        torch.stack([offsets(form) for form in forms]),
        leads(torch.stack([form.weights for form in forms]), features(strengths)),
        torch.tensor([form.threshold for form in forms]),
    )
    for row, method in enumerate(methods):
        prepared = method.prepare(params(), strengths[row], h.dtype, h.device)
        wanted = method.edit(h[row][None, None], prepared, None)[0, 0]  # type: ignore[arg-type]
        torch.testing.assert_close(h[row] + by[row], wanted, rtol=1e-5, atol=1e-4)
