"""ITI against the published formulas written out slowly, its bias form against its hooks, and its edges."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.activations.recording import record
from steerkit.errors import FitError, UnknownNameError
from steerkit.evaluate.calibration import Budget, Search, calibrate
from steerkit.evaluate.controls import refits
from steerkit.evaluate.curve import random_like
from steerkit.methods.iti import InferenceTimeIntervention
from steerkit.network.sites import Site
from steerkit.prompts.splitting import drawn
from steerkit.vector.steering_vector import SteeringVector
from tests.families import BLOCKS, build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

HEADS, WIDTH = 4, 8


def data(count: int = 20) -> steerkit.ContrastSet:
    return steerkit.ContrastSet.from_answers(
        [(f"Is {n % 7} so?", f" Yes, {n} and {n * 3}.", f" No, {n} or {n + 5}.") for n in range(count)]
    )


def fitted(family: str = "llama", items: steerkit.ContrastSet | None = None, **settings: Any) -> SteeringVector:
    method = InferenceTimeIntervention.from_settings(settings)
    return steerkit.fit(build(family), byte_tokenizer(CHATML), items or data(), method=method)


def slow_probe(rows: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Logistic regression of standardised features with a penalty of 1/2 |w|^2, by gradient descent in float64."""
    mean, spread = rows.mean(0), rows.std(0, correction=0)
    features = (rows - mean) / spread
    weights = torch.zeros(rows.shape[1] + 1, dtype=torch.double)
    for _ in range(20_000):
        chances = 1 / (1 + torch.exp(-(features @ weights[:-1] + weights[-1])))
        gradient = torch.cat([features.T @ (chances - labels) + weights[:-1], (chances - labels).sum()[None]])
        weights = weights - 0.02 * gradient
        if float(gradient.norm()) < 1e-9:
            break
    raw = weights[:-1] / spread
    return raw, float(weights[-1] - raw @ mean)


def slow(items: steerkit.ContrastSet, heads: int, along: str) -> dict[tuple[int, int], Tensor]:
    """Layer and head to its shift, straight from the formulas."""
    sites = [Site(layer, "z") for layer in range(BLOCKS)]
    acts = record(build("llama"), byte_tokenizer(CHATML), items, sites, readout="last")
    marks = drawn((items.positive, items.negative), paired=True, share=0.2, seed=0)
    judging = [place for place, mark in enumerate(marks.positive) if mark]
    training = [place for place, mark in enumerate(marks.positive) if not mark]
    assert judging
    assert training
    ranked = []
    for layer, site in enumerate(sites):
        for head in range(HEADS):
            plus, minus = (
                side[site][:, head * WIDTH : (head + 1) * WIDTH].double() for side in (acts.positive, acts.negative)
            )
            rows = torch.cat([plus[training], minus[training]])
            weight, bias = slow_probe(rows, torch.tensor([1.0] * len(training) + [0.0] * len(training)).double())
            high, low = ([float(side[place] @ weight + bias) for place in judging] for side in (plus, minus))
            right = sum(score > 0 for score in high) + sum(score <= 0 for score in low)
            area = sum((a > b) + 0.5 * (a == b) for a in high for b in low) / (len(high) * len(low))
            direction = plus.mean(0) - minus.mean(0) if along == "mean" else weight
            direction = direction / math.sqrt(float((direction**2).sum()))
            projected = [float(row @ direction) for row in torch.cat([plus, minus])]
            middle = sum(projected) / len(projected)
            deviation = math.sqrt(sum((one - middle) ** 2 for one in projected) / len(projected))
            ranked.append((-right / (2 * len(judging)), -area, layer, head, direction * deviation))
    ranked.sort(key=lambda one: one[:4])
    return {(layer, head): shift for _, _, layer, head, shift in ranked[:heads]}


@pytest.mark.parametrize("along", ["mean", "probe"])
def test_it_is_the_published_formula(along: str) -> None:
    expected = slow(data(), 5, along)
    vector = fitted(heads=5, along=along)
    found = {}
    for site in vector.sites:
        shifts = vector.params(site)["direction"].reshape(HEADS, WIDTH)
        found |= {(site.layer, head): shift for head, shift in enumerate(shifts) if bool(shift.any())}
    assert set(found) == set(expected)
    for place, shift in expected.items():
        assert torch.allclose(found[place].double(), shift, rtol=1e-3, atol=1e-5), place


def test_what_strength_does_to_a_head() -> None:
    vector = fitted(heads=2)
    site = vector.sites[0]
    shift = vector.params(site)["direction"]
    h = torch.randn(1, 3, HEADS * WIDTH, generator=torch.Generator().manual_seed(0))
    method = InferenceTimeIntervention(heads=2)
    prepared = method.prepare(vector.params(site), torch.tensor(15.0), torch.float32, torch.device("cpu"))
    assert torch.allclose(method.edit(h, prepared, None), h + 15 * shift)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_it_folds_into_a_bias_of_the_output_projection(family: str) -> None:
    model, vector = build(family), fitted(family, heads=3).at(scope="all")
    ids = torch.arange(1, 17).reshape(2, 8)
    with torch.no_grad():
        plain = model(ids).logits
        with steerkit.steer(model, vector, 4.0):
            hooked = model(ids).logits
        with steerkit.edited(model, vector, 4.0):
            baked = model(ids).logits
            changed = [name for name, _ in model.named_parameters() if name.endswith(("o_proj.bias", "c_proj.bias"))]
        assert torch.equal(model(ids).logits, plain)
    assert changed
    assert torch.allclose(hooked, baked, atol=1e-4)
    assert float((hooked - plain).abs().max()) > 0.05


def test_neurons_fold_into_the_down_projection_too() -> None:
    """What every addition has from its base, not this method alone."""
    model = build("llama")
    vector = steerkit.fit(model, byte_tokenizer(CHATML), data(), method="caa", sites=["mlp_post.1"]).at(scope="all")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        with steerkit.steer(model, vector, 2.0):
            hooked = model(ids).logits
        with steerkit.edited(model, vector, 2.0):
            assert torch.allclose(model(ids).logits, hooked, atol=1e-4)


def test_heads_are_counted_over_all_blocks() -> None:
    assert sum(len(rows) for rows in [table(fitted(heads=6))]) == 6
    assert len(table(fitted())) == 1  # 48 of 1024, of 16
    for heads in (17, -1):
        with pytest.raises(FitError, match=f"heads = {heads}; give 1 to 16, or 0"):
            fitted(heads=heads)
    with pytest.raises(FitError, match="hold no heads of one width"):
        steerkit.fit(build("llama"), byte_tokenizer(CHATML), data(), method="iti", sites=["resid_post.1"])


def table(vector: SteeringVector) -> list[Any]:
    return list(InferenceTimeIntervention().table(vector).rows)


def test_the_table_names_the_heads_best_first() -> None:
    rows = table(fitted(heads=5))
    assert [row[2] for row in rows] == sorted((row[2] for row in rows), reverse=True)
    assert all(0 <= row[1] < HEADS and row[3] > 0 for row in rows)


def test_its_control_is_as_many_random_heads() -> None:
    vector = fitted(heads=5)
    control = random_like(vector, seed=3)
    assert control.sites == vector.sites
    placed = []
    for site in vector.sites:
        own, other = (one.params(site)["direction"].reshape(HEADS, WIDTH).norm(dim=1) for one in (vector, control))
        assert torch.allclose(own.sort().values, other.sort().values, rtol=1e-4)
        placed.append(torch.equal(own > 0, other > 0))
    assert not all(placed)


def test_it_is_fitted_again_on_rearranged_rows() -> None:
    vector = fitted(items=data(24), heads=3)
    found = refits(build("llama"), byte_tokenizer(CHATML), data(24), vector, shuffled=1, halves=1, resamples=2)
    assert found.as_json()


def test_calibration_tries_numbers_of_heads() -> None:
    """Each goes through the whole search on the validation items; the held-out ones see the best alone."""
    calm = [steerkit.Conversation(prompt, answer="So it is.") for prompt in ("Hi", "Where?")]
    setup = steerkit.Setup(
        build("llama"), byte_tokenizer(CHATML), data(8), neutral=calm, texts=1, max_new_tokens=2, batch_size=32
    )
    search = Search(
        candidates=[tuple(range(BLOCKS))],
        strengths=[-2.0, -5.0],
        controls=1,
        settings={"heads": [1, 12], "along": ["mean"]},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these few items are all of one form
        common = {"method": "iti", "readout": "response_mean", "validation": data(8), "budget": Budget(1e9, 1e9, 1.0)}
        found = calibrate(setup, data(16), search=search, **common)
        with pytest.raises(UnknownNameError, match="iti: unknown setting 'head'"):
            calibrate(setup, data(16), search=replace(search, settings={"head": [1]}), **common)
    assert [one["settings"] for one in found.variants] == [{"heads": n, "along": "mean"} for n in (1, 12)]
    assert found.vector is not None
    best = max(found.variants, key=lambda one: one["gain"] or -math.inf)
    assert (found.vector.settings["heads"], found.strength) == (best["settings"]["heads"], best["strength"])
