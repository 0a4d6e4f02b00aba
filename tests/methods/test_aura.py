"""AurA against its formulas written out slowly, its edit, its weight form and its readout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.errors import FitError
from steerkit.evaluate.curve import random_like
from steerkit.export.baking import bake
from steerkit.maths.probes import auc, aucs
from steerkit.methods.aura import AurA
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.vector.steering_vector import SteeringVector
from tests import modes, tolerances
from tests.families import BLOCKS, build
from tests.methods.test_transport import BAD, GOOD, data, gap, logits, model_of
from tests.tiny_tokenizers import CHATML, byte_tokenizer


def fitted(family: str = "llama", sites: Any = None) -> SteeringVector:
    return steerkit.fit(model_of(family), byte_tokenizer(CHATML), data(), method="aura", sites=sites)


def slow_factors(unwanted: Tensor, wanted: Tensor) -> list[float]:
    """Neuron by neuron, couple by couple."""
    found = []
    for place in range(unwanted.shape[1]):
        couples = [(float(a), float(b)) for a in unwanted[:, place] for b in wanted[:, place]]
        area = sum((a > b) + 0.5 * (a == b) for a, b in couples) / len(couples)
        found.append(1 - 2 * (area - 0.5) if area > 0.5 else 1.0)
    return found


def test_areas_become_factors() -> None:
    """AUROC .3, .5, .75 and 1 give 1, 1, .5 and 0."""
    wanted = torch.arange(10.0)[:, None].expand(-1, 4)
    unwanted = torch.tensor([[2.5, 4.5, 7.0, 99.0]])  # 7 is larger than seven of ten, and the same as one
    torch.testing.assert_close(aucs(unwanted, wanted), torch.tensor([0.3, 0.5, 0.75, 1.0]).double())
    factor = AurA().fit_site(wanted, unwanted)["factor"]
    torch.testing.assert_close(factor, torch.tensor([1.0, 1.0, 0.5, 0.0]))


def test_areas_of_many_neurons_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randint(0, 5, (n, 12), generator=generator).float() for n in (7, 9))
    found = aucs(one, other)
    for place in range(12):
        assert float(found[place]) == pytest.approx(auc(one[:, place], other[:, place]), abs=1e-12)
    with pytest.raises(FitError, match="0 and 9 rows"):
        aucs(one[:0], other)
    with pytest.raises(FitError, match=r"give \[n, d\] and \[m, d\]"):
        aucs(one[:, :3], other)


def test_the_fit_is_the_slow_form_of_the_largest_values() -> None:
    model: Any = model_of("llama")
    vector = fitted()
    assert vector.sites == tuple(Site(layer, "mlp_post") for layer in range(BLOCKS))
    assert vector.readout == "max"
    for site, tap in locate(model, vector.sites).items():
        sides = []
        for texts in (BAD, GOOD):
            rows: list[Tensor] = []
            handle = tap.attach(lambda h, rows=rows: (rows.append(h[0, 1:].amax(0)), h)[1])
            for text in texts:
                logits(model, torch.tensor([byte_tokenizer(CHATML)(text)["input_ids"]]))
            handle.remove()
            sides.append(torch.stack(rows))
        wanted = torch.tensor(slow_factors(*sides))
        found = vector.params(site)["factor"]
        # A couple of equal size up to rounding may fall either way: one couple of twenty is a tenth of a factor.
        assert float((found - wanted).abs().max()) < 0.11
        assert float((found - wanted).abs().mean()) < 0.01
        assert 0 <= float(found.min()) <= 0.5


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0, -0.5])
def test_the_edit_is_the_slow_form_and_no_sign_changes(strength: float) -> None:
    model, site = model_of("llama"), Site(1, "mlp_post")
    vector = fitted(sites=[site])
    factor = vector.params(site)["factor"].double()

    def by_hand(h: Tensor) -> Tensor:
        kept = ((1 - strength) + strength * factor).clamp_min(0)
        return (h.double() * kept).float()

    handle = locate(model, [site])[site].attach(by_hand)
    wanted = logits(model)
    handle.remove()
    with steerkit.steer(model, vector, strength):
        assert gap(logits(model), wanted) < tolerances.of_family("llama")
    assert gap(wanted, logits(model)) > 1e-3


@pytest.mark.parametrize("mode", ["cached", "left_padded", "per_row"])
@pytest.mark.parametrize("scope", ["all", "response"])
def test_every_mode_is_one_plain_pass(scope: str, mode: str) -> None:
    model = model_of("llama")
    for one, expected, baseline in modes.run_steered(model, mode, fitted().at(scope=scope), 1.0):
        assert modes.gap(one, expected) < tolerances.of_family("llama")
        assert modes.gap(one, baseline) > 1e-4


@pytest.mark.parametrize(("family", "sites"), [("llama", None), ("gpt2", ["mlp_out.1", "attn_in.2", "z.2"])])
def test_what_is_baked_is_what_hooks_do(family: str, sites: Any, tmp_path: Path) -> None:
    model, vector = model_of(family), fitted(family, sites)
    with steerkit.steer(model, vector, 0.7):
        wanted = logits(model)
    baked = bake(model, None, vector, tmp_path / "out", strength=0.7)
    again: Any = type(model).from_pretrained(tmp_path / "out").eval()
    assert gap(logits(again), wanted) < tolerances.of_family(family)
    assert gap(wanted, logits(model)) > 1e-2
    assert not baked.switches and not baked.added


def test_the_control_damps_other_neurons_as_much() -> None:
    vector = fitted(sites=["mlp_post.1"])
    own, other = (one.params(Site(1, "mlp_post"))["factor"] for one in (vector, random_like(vector, seed=1)))
    assert torch.equal(own.sort().values, other.sort().values)
    assert not torch.equal(own, other)


def test_its_table_says_how_many_are_damped() -> None:
    vector = fitted(sites=["mlp_post.1"])
    factor = vector.params(Site(1, "mlp_post"))["factor"]
    ((layer, damped, mean, smallest),) = AurA().table(vector).rows
    assert (layer, damped) == (1, int((factor < 1).sum()))
    assert mean == pytest.approx(float(factor[factor < 1].mean()))
    assert smallest == float(factor.min())


def test_nothing_to_damp_is_said() -> None:
    with pytest.raises(FitError, match="nothing to damp"):
        AurA().fit_site(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
    with pytest.raises(steerkit.errors.SiteError, match="routes tokens"):
        steerkit.fit(build("mixtral"), byte_tokenizer(CHATML), data(), method="aura")
