"""Steer2Edit against its reference outputs, against slow, obvious forms, and as hooks against weights."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import steerkit
from steerkit.activations.moments import Means
from steerkit.activations.readout import Readout
from steerkit.activations.recording import Activations, record
from steerkit.checks.contract import conformance
from steerkit.errors import DataError, FitError, ModelError, SiteError, StrengthError, VectorMismatchError
from steerkit.fitting.fitting import fit
from steerkit.maths.rank_one import add_in_order, elastic_net, rank_one_edit, score_components
from steerkit.methods.steer2edit import Steer2Edit
from steerkit.network.decoder import find_decoder
from steerkit.network.linears import linears_at, writers_at
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.network.weight_digests import check_weights, weight_digests
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.rendering import Rendered
from steerkit.vector.steering_vector import SteeringVector
from tests import modes, tolerances
from tests.choices import mostly_slow
from tests.families import FAMILIES, build
from tests.methods.test_every_method import PAIRS, data_for
from tests.pairwise import pairwise
from tests.tiny_tokenizers import CHATML, byte_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
BLOCK_NAMES = {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}
# Low thresholds, so that on random models many components are edited, in both directions.
SMALL = Steer2Edit(rho_attn=0.3, rho_mlp=0.5, alpha=0.2)
ROUTED = ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_next")
POST_NORM = ("gemma2", "gemma3_text", "gemma3_vlm", "olmo2")
EDITED = [family for family in FAMILIES if family != "mamba"]


@functools.cache
def arrays() -> dict[str, Tensor]:
    return load_file(GOLDEN / "steer2edit.safetensors")


@functools.cache
def facts() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / "steer2edit.json").read_text(encoding="utf-8"))
    return dict(found["meta"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Magnitudes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_magnitudes_are_the_reference_s_in_every_precision(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    for row, (rho, alpha) in enumerate(facts()["elastic_net/rho_alpha"]):
        got = elastic_net(arrays()["elastic_net/g"].to(dtype), rho, alpha)
        assert got.dtype == dtype
        assert torch.equal(got, arrays()[f"elastic_net/lambda_{name}"][row]), (rho, alpha)


def test_magnitudes_maximise_the_objective() -> None:
    """No grid of magnitudes does better than the closed form."""
    rho, alpha = 0.3, 0.6
    grid = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    for g in (-0.9, -0.18, -0.05, 0.0, 0.17, 0.181, 0.5, 1.0):
        gain = g * grid - rho * (alpha * grid.abs() + (1 - alpha) / 2 * grid**2)
        (got,) = elastic_net(torch.tensor([g], dtype=torch.float64), rho, alpha).tolist()
        assert abs(got - float(grid[gain.argmax()])) < 1.1e-3


@pytest.mark.parametrize("alpha", [1.0, 1.5, -0.1, float("nan")])
def test_an_alpha_that_the_reference_lets_through_is_refused(alpha: float) -> None:
    """The released code gives infinite, wrongly signed or unlimited edits there (golden `edge/outcomes`)."""
    with pytest.raises(FitError, match="0 <= alpha < 1"):
        elastic_net(torch.tensor([0.5]), 0.3, alpha)
    with pytest.raises(FitError, match="0 <= alpha < 1"):
        Steer2Edit(alpha=alpha)


def test_nothing_that_is_not_finite_reaches_a_weight() -> None:
    """The released code writes NaN into the weights of a component whose mean is NaN."""
    weight, direction, mean = draw(6, 8), draw(6, seed=1), draw(8, seed=2)
    for place, name in enumerate(("weight", "direction", "mean_input")):
        given = [weight.clone(), direction.clone(), mean.clone()]
        given[place].view(-1)[3] = float("nan")
        with pytest.raises(FitError, match=name):
            rank_one_edit(*given, rho=0.3, alpha=0.5, head_width=2)
    with pytest.raises(FitError, match="finite"):
        elastic_net(torch.tensor([float("nan")]), 0.3, 0.5)
    for rho in (float("nan"), float("inf")):
        with pytest.raises(FitError, match="finite number"):
            elastic_net(torch.tensor([0.5]), rho, 0.5)


@pytest.mark.parametrize(
    ("shapes", "width", "match"),
    [
        (((6, 8), (8,), (6,)), None, "direction"),
        (((6, 8), (6,), (6,)), None, "mean_input"),
        (((6,), (6,), (6,)), None, "weight"),
        (((6, 8), (6,), (8,)), 3, "head_width 3"),
        (((6, 8), (6,), (8,)), 0, "head_width 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: Any, width: int | None, match: str) -> None:
    with pytest.raises(FitError, match=match):
        rank_one_edit(*(torch.ones(shape) for shape in shapes), rho=0.3, alpha=0.5, head_width=width)


# One matrix


def slow_edit(weight: Tensor, v: Tensor, mean: Tensor, rho: float, alpha: float, width: int) -> tuple[Tensor, Tensor]:
    """The paper's three steps, component by component; gives the edited weight and the magnitudes."""
    edited, magnitudes = weight.clone(), []
    unit = v / v.norm()
    for start in range(0, weight.shape[1], width):
        part = weight[:, start : start + width]
        written = part @ mean[start : start + width]
        g = float(unit @ written / written.norm()) if bool(written.any()) else 0.0
        over = abs(g) - rho * alpha
        magnitude = 0.0 if over <= 0 else over / (rho * (1 - alpha)) * (1 if g > 0 else -1)
        k = part.T @ unit
        if magnitude and bool(k.any()):
            edited[:, start : start + width] += magnitude * torch.outer(unit, k / k.norm())
        magnitudes.append(magnitude)
    return edited, torch.tensor(magnitudes, dtype=torch.float64)


@pytest.mark.parametrize("width", [None, 4])
def test_the_edit_in_its_slow_form(width: int | None) -> None:
    weight, direction, mean = (one.double() for one in (draw(10, 96), 3 * draw(10, seed=1), draw(96, seed=2)))
    for rho, alpha in ((0.2, 0.5), (0.5, 0.0), (0.3, 0.9)):
        expected, magnitudes = slow_edit(weight, direction, mean, rho, alpha, width or 1)
        gate = rank_one_edit(weight, direction, mean, rho=rho, alpha=alpha, head_width=width)
        assert gate.dtype == torch.float64
        torch.testing.assert_close(weight + torch.outer(direction / direction.norm(), gate), expected)
        parts = score_components(weight, direction, mean, rho=rho, alpha=alpha, head_width=width)
        torch.testing.assert_close(parts.magnitude, magnitudes)
        assert bool((magnitudes < 0).any()) and bool((magnitudes > 0).any())
    half = rank_one_edit(weight.bfloat16(), direction.float(), mean, rho=0.5, alpha=0.0, head_width=width)
    assert half.dtype == torch.float32


def test_properties_of_the_edit() -> None:
    """It scales what a head writes along the direction by 1 + a/c, nothing else; at the mean it only ever adds."""
    weight, direction, mean = draw(12, 20), draw(12, seed=1), draw(20, seed=2)
    parts = score_components(weight, direction, mean, rho=0.3, alpha=0.1, head_width=5)
    u = direction / direction.norm()
    edited = weight + torch.outer(u, parts.gate)
    for head in range(4):
        columns = slice(5 * head, 5 * head + 5)
        c = (weight[:, columns].T @ u).norm()
        grown = torch.eye(12) + parts.magnitude[head] / c * torch.outer(u, u)
        torch.testing.assert_close(edited[:, columns], grown @ weight[:, columns])
        added = (edited[:, columns] - weight[:, columns]) @ mean[columns]
        assert float(added @ u) >= 0
        torch.testing.assert_close(added, float(added @ u) * u, atol=1e-6, rtol=0)
    neurons = score_components(weight, direction, mean, rho=0.3, alpha=0.1)
    edited_ones = neurons.magnitude != 0
    assert torch.equal(neurons.gate.sign()[edited_ones], mean.sign()[edited_ones])
    assert not torch.equal(neurons.gate.sign()[edited_ones], neurons.magnitude.sign()[edited_ones])


def test_the_cap_stops_a_component_at_nothing() -> None:
    weight, direction, mean = 0.1 * draw(12, 20), draw(12, seed=1), draw(20, seed=2)
    u = direction / direction.norm()
    for width in (1, 5):
        free, capped = (
            score_components(weight, direction, mean, rho=0.1, alpha=0.1, head_width=width, no_reversal=cap)
            for cap in (False, True)
        )
        written = (weight.T @ u).reshape(-1, width).norm(dim=1)
        assert bool((free.magnitude < -written).any()), "the case is not what it says"
        assert bool((capped.magnitude >= -written).all())
        kept = free.magnitude >= -written
        assert torch.equal(capped.magnitude[kept], free.magnitude[kept])
        gone = weight + torch.outer(u, capped.gate)
        left = ((gone.T @ u).reshape(-1, width) * (weight.T @ u).reshape(-1, width)).sum(dim=1)
        assert float(left.min()) > -1e-7, "a component was reversed"
    gate = rank_one_edit(weight, direction, mean, rho=0.1, alpha=0.1, no_reversal=True)
    assert torch.equal(gate, score_components(weight, direction, mean, rho=0.1, alpha=0.1, no_reversal=True).gate)


# The reference's edits


SETTINGS = [
    name
    for name, value in json.loads((GOLDEN / "steer2edit.json").read_text(encoding="utf-8"))["meta"].items()
    if name.startswith(("synthetic/", "edge/llama/")) and isinstance(value, dict) and "rho_attn" in value
]


def matrices(setting: str) -> Iterator[tuple[int, str, Tensor, Tensor, Tensor]]:
    """(layer, block, weight, direction, mean input) of a golden setting, as far as the weight is stored."""
    group = setting.rpartition("/")[0]
    for layer in range(4):
        for block, name in BLOCK_NAMES.items():
            weight = arrays().get(f"{group}/weights/model.layers.{layer}.{name}.weight")
            means = [arrays()[f"{group}/directions/pre/{side}_mean/{block}"][layer] for side in ("pos", "neg")]
            if weight is not None:
                direction = arrays()[f"{group}/directions/post/direction/{block}"][layer]
                yield layer, block, weight, direction, 0.5 * (means[0] + means[1])


@pytest.mark.parametrize("setting", SETTINGS)
def test_scores_and_factors_are_the_reference_s(setting: str) -> None:
    given, edited = facts()[setting], {"attn": 0, "mlp": 0}
    for layer, block, weight, direction, mean in matrices(setting):
        rho, head = given[f"rho_{block}"], weight.shape[1] // 4 if block == "attn" else None
        parts = score_components(weight, direction, mean, rho=rho, alpha=given["alpha"], head_width=head)
        expected = {
            name: arrays()[f"{setting}/{name}"][layer].float()
            for name in (f"g_{block}", f"lambda_raw_{block}", f"lambda_{block}", f"vhat_{block}")
        }
        stored = expected[f"lambda_{block}"]
        edited[block] += int((parts.magnitude != 0).sum())
        if rho > 0:  # the reference stores zeros where the block is off
            torch.testing.assert_close(parts.score, expected[f"g_{block}"], atol=1e-6, rtol=0)
        signs = parts.inputs[:, 0].sign() if block == "mlp" else 1.0
        torch.testing.assert_close(parts.magnitude * signs, stored, atol=1e-5, rtol=0)
        raw = expected[f"lambda_raw_{block}"]
        torch.testing.assert_close(parts.magnitude, raw * (parts.inputs.norm(dim=1) > 0), atol=1e-5, rtol=0)
        assert torch.equal(parts.magnitude != 0, stored != 0)
        if block == "attn":
            k_hat = arrays()[f"{setting}/k_hat"][layer]
            # A row is W^T v at length 1. Where W^T v is small beside its terms (a head almost orthogonal to v),
            # rounding the terms turns the row by their ratio, its condition number: 5e4 in one head of `edge`.
            unit = direction / direction.norm().clamp_min(1e-12)
            terms = (weight.abs().T @ unit.abs()).reshape(4, -1).norm(dim=1)
            condition = terms / (weight.T @ unit).reshape(4, -1).norm(dim=1).clamp_min(1e-12)
            reach = tolerances.ROUNDINGS * torch.finfo(torch.float32).eps * condition[:, None]
            assert bool(((parts.inputs * (stored != 0)[:, None] - k_hat).abs() <= reach).all())
        gate = rank_one_edit(weight, direction, mean, rho=rho, alpha=given["alpha"], head_width=head)
        torch.testing.assert_close(gate, parts.gate)
        if bool(direction.any()):
            unit = direction / direction.norm()
            torch.testing.assert_close(unit, expected[f"vhat_{block}"], atol=1e-6, rtol=0)
    assert edited == {"attn": given["edited_heads"], "mlp": given["edited_neurons"]}


def test_edge_cases_are_the_reference_s() -> None:
    """Zero direction, dead head and neuron, zero weights, tiny means, a head nearly orthogonal: section 10."""
    rows = {(layer, block): rest for layer, block, *rest in matrices("edge/llama/safety")}
    weight, direction, mean = rows[2, "mlp"]
    parts = score_components(weight, direction, mean, rho=0.3, alpha=0.8)
    observed = facts()["edge/llama/observed"]
    torch.testing.assert_close(
        parts.score[5:11], torch.tensor(observed["safety: g of layer-2 neurons 5..10"]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        parts.gate[5:11], torch.tensor(observed["safety: stored lambda of layer-2 neurons 5..10"]), atol=1e-5, rtol=0
    )
    nothing = rank_one_edit(weight, torch.zeros_like(direction), mean, rho=0.3, alpha=0.0)
    assert torch.equal(nothing, torch.zeros(weight.shape[1]))
    weight, direction, mean = rows[1, "attn"]
    dead = rank_one_edit(weight, direction, mean, rho=0.5, alpha=0.0, head_width=16).reshape(4, 16)
    assert not bool(dead[1].any()) and bool(dead[[0, 2, 3]].any(dim=1).all())
    weight, direction, mean = rows[3, "attn"]
    ridge = score_components(weight, direction, mean, rho=0.5, alpha=0.0, head_width=16)
    g, magnitude, length = observed["ridge: layer-3 head 0 (almost orthogonal) g, lambda, |k_hat|"]
    assert abs(float(ridge.score[0]) - g) < 1e-6 and abs(float(ridge.magnitude[0]) - magnitude) < 1e-5
    assert abs(float(ridge.inputs[0].norm()) - length) < 1e-6


# Whole extractions


def golden_model(task: str, dtype: torch.dtype) -> Any:
    """The reference's model; of the safety one only the first two blocks and no head are kept."""
    config = dict(facts()[f"extract/{task}/config"])
    weights = {
        name.removeprefix(f"extract/{task}/weights/"): value
        for name, value in arrays().items()
        if name.startswith(f"extract/{task}/weights/")
    }
    layers = 1 + max(int(name.split(".")[2]) for name in weights if ".layers." in name)
    config.update(
        num_hidden_layers=layers, **({"layer_types": config["layer_types"][:layers]} if "layer_types" in config else {})
    )
    cls = getattr(transformers, facts()[f"extract/{task}/class"])
    with torch.random.fork_rng(devices=[]):
        model = cls(cls.config_class(**config)).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.set_attn_implementation("eager")
    for parameter in model.parameters():  # not the frequencies of the positions, which are read in float32
        parameter.data = parameter.data.to(dtype)
    return model


def golden_acts(task: str, run: str, model: Any) -> Activations:
    """What is read from the reference's token ids, over its span, at every site of the method."""
    ids_of = f"extract/{task}/{'fp32' if run == 'bf16' else run}"
    texts = [
        Rendered("", tuple(row[:length].tolist()), int(start), ())
        for row, length, start in zip(
            *(arrays()[f"{ids_of}/{name}"] for name in ("input_ids", "length", "start")), strict=True
        )
    ]
    sites = list(locate(model, Steer2Edit().sites(find_decoder(model))))
    found = record(model, byte_tokenizer(CHATML), texts, sites, readout="predicting_mean", batch_size=1)
    count = facts()[f"extract/{task}"]["n_pos"]
    sides = [{site: rows[part] for site, rows in found.positive.items()} for part in (slice(count), slice(count, None))]
    return replace(found, positive=sides[0], negative=sides[1])


def places(layer: int, block: str, acts: Activations) -> tuple[Site, Site]:
    """What the projection reads, and what it writes."""
    kinds = {site.kind for site in acts.positive if site.layer == layer and site.kind.startswith(block)}
    return Site(layer, "z" if block == "attn" else "mlp_post"), Site(layer, (kinds - {"mlp_post"}).pop())


RUNS = [
    (task, run)
    for task in ("safety_alignment", "truthfulness", "efficient_reasoning")
    for run in ("fp32", "bf16", "fp32_paired")
    if run != "fp32_paired" or task == "safety_alignment"
]


@pytest.mark.parametrize(("task", "run"), RUNS)
def test_what_is_read_is_the_reference_s(task: str, run: str) -> None:
    """Tiny Llama, Gemma-2 (before its post-norms) and Qwen2; streamed means, in float32 and rounded as released."""
    is_half = run == "bf16"
    model = golden_model(task, torch.bfloat16 if is_half else torch.float32)
    acts = golden_acts(task, run, model)
    method = Steer2Edit(precision="bfloat16" if is_half else "float32")
    with tolerances.rounded_input(model, 0):
        moved = golden_acts(task, run, model)
    for layer in range(find_decoder(model).num_layers):
        for block in ("attn", "mlp"):
            read, written = places(layer, block, acts)
            for side, site in (("pre", read), ("post", written)):
                both = [streamed_means(method, one, site) for one in (acts, moved)]
                for mean, again, name in zip(*both, ("pos_mean", "neg_mean"), strict=True):
                    expected = arrays()[f"extract/{task}/{run}/{side}/{name}/{block}"][layer].float()
                    if is_half:  # rounded as released, and no further off than rounding the model's input takes it
                        assert torch.equal(mean, mean.bfloat16().float())
                        step = torch.finfo(torch.bfloat16).eps * float(expected.abs().max())
                        apart = max(step, tolerances.ROUNDINGS * float((again - mean).abs().max()))
                        assert float((mean - expected).abs().max()) <= apart
                        assert float((mean - expected).abs().median()) <= step
                    else:
                        torch.testing.assert_close(mean, expected, atol=1e-5, rtol=0)
    assert isinstance(method.statistics(read), Means)


def streamed_means(method: Steer2Edit, acts: Activations, site: Site) -> list[Tensor]:
    """Both sides' means, from many small batches."""
    stream = method.statistics(site)
    for row in range(max(len(acts.positive[site]), len(acts.negative[site]))):
        stream.update(acts.positive[site][row : row + 1], acts.negative[site][row : row + 1])
    return [mean[0] for mean in stream.result()]


def test_the_released_pairing_of_safety_is_another_direction() -> None:
    """Benign answers behind the malicious questions: the cosine with the right pairing is far from 1."""
    for block in ("attn", "mlp"):
        wrong, right = (
            arrays()[f"extract/safety_alignment/{run}/post/direction/{block}"] for run in ("fp32", "fp32_paired")
        )
        assert float(torch.cosine_similarity(wrong, right, dim=1).max()) < 0.9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", ["truthfulness", "efficient_reasoning"])
def test_from_prompts_to_logits_as_the_reference(task: str, precision: str) -> None:
    group, dtype = f"pipeline/{task}/{precision}", torch.bfloat16 if precision == "bf16" else torch.float32
    model = golden_model(task, dtype)
    given = facts()[group]
    method = Steer2Edit(
        rho_attn=given["rho_attn"],
        rho_mlp=given["rho_mlp"],
        alpha=given["alpha"],
        precision="bfloat16" if precision == "bf16" else "float32",
    )
    acts = golden_acts(task, precision, model)
    vector = fit(model, byte_tokenizer(CHATML), data_for(method), method=method, acts=acts)
    counts = {"attn": 0, "mlp": 0}
    for site in vector.sites:
        block = site.kind.partition("_")[0]
        params = vector.params(site)
        counts[block] += int((params["magnitude"] != 0).sum())
        # In bfloat16 two steps of a score of 1, times what a magnitude makes of a score.
        reach = 1e-5 if precision == "fp32" else 2 * 2.0**-8 / (given[f"rho_{block}"] * (1 - given["alpha"]))
        stored = arrays()[f"{group}/lambda_{block}"][site.layer].float()
        got = params["gate"] if block == "mlp" else params["magnitude"]
        torch.testing.assert_close(got, stored, atol=reach, rtol=0)
        close = 1e-5 if precision == "fp32" else 2.0**-7
        direction = arrays()[f"{group}/vhat_{block}"][site.layer].float()
        torch.testing.assert_close(params["direction"], direction, atol=close, rtol=0)
    if precision == "fp32":
        assert counts == {"attn": given["edited_heads"], "mlp": given["edited_neurons"]}
    ids = arrays()["fixed_input_ids"]
    with steerkit.edited(model, vector), torch.no_grad():
        logits = model(ids).logits.float()
        for name, parameter in model.named_parameters():
            expected = arrays().get(f"{group}/edited/{name}")
            if expected is not None and precision == "fp32":
                torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=0)
    with steerkit.steer(model, vector), torch.no_grad():
        hooked = model(ids).logits.float()
    expected = arrays()[f"{group}/logits"]
    if precision == "fp32":
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(hooked, expected, atol=1e-4, rtol=0)
    else:
        size = float(expected.abs().max())
        assert float((logits - expected).abs().max()) < 0.05 * size
        assert float((hooked - expected).abs().max()) < 0.05 * size


@pytest.mark.parametrize("task", ["truthfulness", "efficient_reasoning"])
def test_weights_in_bfloat16_are_the_reference_s_bit_for_bit(task: str) -> None:
    """From the stored factors: outer product, times magnitude, sum; `edited` does so, too. One float32 sum differs."""
    group = f"pipeline/{task}/bf16"
    model = golden_model(task, torch.bfloat16)
    weights = dict(model.named_parameters())
    tensors, sites, compared, fused = {}, [], 0, 0
    for layer in range(4):
        for block, name in BLOCK_NAMES.items():
            full = f"model.layers.{layer}.{name}.weight"
            vhat, magnitude = (arrays()[f"{group}/{key}_{block}"][layer].float() for key in ("vhat", "lambda"))
            inputs = arrays()[f"{group}/k_hat"][layer].float() if block == "attn" else torch.ones(len(magnitude), 1)
            expected = arrays().get(f"{group}/edited/{full}", weights[full].detach())
            old = weights[full].detach()
            got = add_in_order(old, vhat, inputs, magnitude)
            assert got.dtype == torch.bfloat16 and torch.equal(got, expected)
            once = (old.float() + torch.outer(vhat, (inputs * magnitude[:, None]).flatten())).bfloat16()
            fused += int((once != expected).sum())
            compared += int((expected != old).sum())
            if bool(magnitude.any()):
                kind = f"{block}_{'raw' if task == 'truthfulness' else 'out'}"
                sites.append(Site(layer, kind))
                parts = {"direction": vhat, "gate": (inputs * magnitude[:, None]).flatten(), "magnitude": magnitude}
                tensors.update({f"{sites[-1]}/{key}": value for key, value in parts.items()})
    assert compared > 1000 and fused > 50, "the case is not what it says"
    method = Steer2Edit(precision="bfloat16")
    vector = SteeringVector(
        method="steer2edit", tensors=tensors, sites=tuple(sites), edit="rank_one", scope="all", unit="paper",
        model_type=model.config.model_type, hidden_size=32, num_layers=4, settings=method.settings,
    )  # fmt: skip
    before = {name: value.detach().clone() for name, value in weights.items()}
    with steerkit.edited(model, vector), torch.no_grad():
        for name, parameter in weights.items():
            assert torch.equal(parameter, arrays().get(f"{group}/edited/{name}", before[name])), name
        # The reference's edited model was rounded as a whole, the frequencies of its positions too.
        logits = copy.deepcopy(model).to(torch.bfloat16)(arrays()["fixed_input_ids"]).logits.float()
    assert torch.equal(logits, arrays()[f"{group}/logits"])
    assert all(torch.equal(parameter, before[name]) for name, parameter in weights.items())


# As a method


@functools.cache
def fitted(family: str, method: Steer2Edit = SMALL) -> tuple[Any, SteeringVector]:
    """A model and a vector of it; the model comes back from every test as it was."""
    model = build(family)
    return model, fit(model, byte_tokenizer(CHATML), data_for(method), method=method)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def slow_logits(model: Any, vector: SteeringVector, strength: float, ids: Any) -> Tensor:
    """Hooks written out by hand on the layers themselves, token by token."""
    handles = []
    for site, linear in linears_at(model, vector.sites).items():
        params = vector.params(site)

        def hook(_module: Any, args: Any, output: Tensor, params: Any = params) -> Tensor:
            changed = output.clone()
            for x, y in zip(args[0].reshape(-1, args[0].shape[-1]), changed.view(-1, output.shape[-1]), strict=True):
                y += strength * sum(float(a * b) for a, b in zip(x, params["gate"], strict=True)) * params["direction"]
            return changed

        handles.append(linear.tap.module.register_forward_hook(hook))
    try:
        return modes.plain_logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", mostly_slow(EDITED, ["llama", "gpt2", "gemma3_text", "qwen3_next", "qwen3_moe"]))
def test_hooks_are_the_edited_weights_and_the_undo_is_bitwise(family: str) -> None:
    model, vector = fitted(family)
    kinds = {site.kind for site in vector.sites}
    assert {kind.partition("_")[0] for kind in kinds} >= {"attn", "mlp"}
    assert any(kind.endswith("_raw") for kind in kinds) == (family in POST_NORM)
    before = state_of(model)
    baseline = modes.plain_logits(model, modes.SHORT)
    for strength in (1.0, -0.6):
        with steerkit.steer(model, vector, strength):
            hooked = modes.plain_logits(model, modes.SHORT)
        with steerkit.edited(model, vector, strength):
            folded = modes.plain_logits(model, modes.SHORT)
            written = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert float((folded - hooked).abs().max() / hooked.abs().max()) < tolerances.of_family(family)
        assert float((hooked - baseline).abs().max() / baseline.abs().max()) > 1e-3
        assert {name.replace(".base_layer", "").removeprefix("base_model.model.") for name in written} == {
            name for writer in writers_at(model, vector.sites).values() for name in writer.parameters
        }
    with steerkit.edited(model, vector, 0.0):
        assert torch.equal(modes.plain_logits(model, modes.SHORT), baseline)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(modes.plain_logits(model, modes.SHORT), baseline)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "falcon"])
def test_hooks_in_their_slow_form(family: str) -> None:
    model, vector = fitted(family)
    with steerkit.steer(model, vector, 0.8):
        hooked = modes.plain_logits(model, modes.SHORT)
    expected = slow_logits(model, vector, 0.8, modes.SHORT)
    assert float((hooked - expected).abs().max() / expected.abs().max()) < tolerances.of_family(family)


@pytest.mark.parametrize(("family", "mode"), pairwise(["llama", "opt", "gpt_oss"], sorted(modes.MODES), strength=1))
def test_every_way_of_running_gives_what_one_pass_gives(family: str, mode: str) -> None:
    """Rows with strengths of their own, caches, beams, chunks, pads: as for every other method."""
    model, vector = fitted(family)
    for ran, expected, baseline in modes.run_steered(model, mode, vector, 0.7):
        assert modes.gap(ran, expected) < tolerances.of_family(family)
        assert modes.gap(ran, baseline) > 1e-3


@pytest.mark.parametrize("scope", ["prompt", "response", "generated", "first(3)"])
def test_other_scopes_write_only_their_tokens(scope: str) -> None:
    model, vector = fitted("opt")
    captured: dict[str, Tensor] = {}
    (first,) = linears_at(model, [next(site for site in vector.sites if site.kind == "mlp_out")]).values()

    def keep(_module: Any, _args: Any, output: Tensor) -> None:
        captured["now"] = output.clone()

    handle = first.tap.module.register_forward_hook(keep)
    ids = torch.tensor([modes.SHORT])
    with torch.no_grad():
        model(ids)
        baseline = captured["now"]
        with steerkit.steer(model, [vector.at(strength=1.0)], scope=scope, prompt_lengths=[4]):
            model(ids)
    handle.remove()
    moved = (captured["now"] != baseline).any(dim=-1).flatten().tolist()
    expected = {"prompt": range(4), "response": range(3, 6), "generated": range(4, 6), "first(3)": range(3)}[scope]
    earliest = min(expected)  # later tokens may differ by attention, never earlier ones
    assert moved[earliest] and not any(moved[:earliest])


@pytest.mark.parametrize("family", mostly_slow(["llama", "qwen3_moe"], ["llama"]))
def test_compiled_as_one_graph_and_a_changed_strength_recompiles_nothing(family: str) -> None:
    torch._dynamo.reset()
    model, calls = build(family), []
    vector = fitted(family)[1]

    def backend(graph: Any, _inputs: Any, **_options: Any) -> Any:
        calls.append(1)
        return graph.forward

    ids = torch.tensor([[5, 17, 44, 9], [7, 23, 42, 88]])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad(), steerkit.steer(model, vector, [1.0, 0.0]) as steering:
        compiled(ids)
        before = len(calls)
        for strength in ([1.0, 0.0], [0.0, -0.5], [2.0, 2.0]):
            steering.strength = strength
            got = compiled(ids).logits
            with torch.compiler.set_stance("force_eager"):
                expected = model(ids).logits
            assert float((got - expected).abs().max() / expected.abs().max()) < tolerances.of_family(family)
        assert len(calls) == before
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_training_reaches_through_the_edit(family: str) -> None:
    model, vector = fitted(family)
    embeds = model.get_input_embeddings()(torch.tensor([modes.SHORT])).detach().requires_grad_()
    with steerkit.steer(model, vector):
        model(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None and bool(embeds.grad.any())
    model.zero_grad()


def test_a_family_s_own_heads() -> None:
    for family, width in (("qwen3", 16), ("gpt2", 8), ("qwen3_next", 8)):
        _, vector = fitted(family)
        for site in vector.sites:
            params = vector.params(site)
            size = len(params["gate"]) // len(params["magnitude"])
            assert size == (1 if site.kind.startswith("mlp") else width)
    assert "mixer_out" in {site.kind for site in fitted("qwen3_next")[1].sites}


def test_state_spaces_are_left_alone() -> None:
    """A state-space block has no heads."""
    with pytest.raises(SiteError, match=r"steer2edit.*has no heads"):
        fit(build("mamba"), byte_tokenizer(CHATML), data_for(SMALL), method=SMALL)


def test_one_block_can_be_left_alone() -> None:
    for method, prefix in ((replace(SMALL, rho_mlp=0.0), "attn"), (replace(SMALL, rho_attn=0.0), "mlp")):
        kinds = {site.kind.partition("_")[0] for site in fitted("llama", method)[1].sites}
        assert kinds == {prefix}
    with pytest.raises(FitError, match="edits nothing"):
        Steer2Edit(rho_attn=0.0, rho_mlp=-1.0)


def test_layers_and_exact_sites() -> None:
    model, _ = fitted("llama")
    common: dict[str, Any] = {"method": SMALL}
    tokenizer, data = byte_tokenizer(CHATML), data_for(SMALL)
    whole, some = fitted("llama")[1], fit(model, tokenizer, data, layers=[1, 2], **common)
    assert {site.layer for site in some.sites} <= {1, 2}
    for name, tensor in some.tensors.items():  # what is edited in one block does not depend on the others
        torch.testing.assert_close(tensor, whole.tensors[name])
    one = fit(model, tokenizer, data, sites=["z.1", "attn_out.1"], **common)
    assert one.sites == (Site(1, "attn_out"),)
    for sites, match in (
        (["attn_out.1"], "needs z.1"),
        (["z.1"], "no site is written"),
        (["resid_post.1"], "resid_post"),
    ):
        with pytest.raises(FitError, match=match):
            fit(model, tokenizer, data, sites=sites, **common)


def test_nothing_above_the_threshold_is_an_error_with_the_numbers() -> None:
    with pytest.raises(FitError, match=r"largest \|score\| is 0\.\d+ where rho_attn \* alpha = 0\.99") as error:
        fitted("llama", Steer2Edit(rho_attn=1.1, rho_mlp=1.1, alpha=0.9))
    assert "rho_mlp" in str(error.value)
    model = build("llama")
    texts = ["one text", "another"]
    same = ContrastSet.from_prompts(texts, [*reversed(texts)], raw=True)
    with pytest.raises(FitError, match="no direction"):
        fit(model, byte_tokenizer(CHATML), same, method=SMALL, readout="mean")


def test_empty_answers_are_refused() -> None:
    """The released code warns, and then every head and neuron of the model becomes NaN."""
    with pytest.raises(DataError):
        ContrastSet.from_answers([("What was it like?", "", "Bad.")])
    model, tokenizer = fitted("llama")[0], byte_tokenizer(CHATML)
    prompts = ContrastSet.from_prompts(["a", "b"], ["c", "d"])
    for readout in (None, "predicting_mean"):
        with pytest.raises(DataError, match="give answers"):
            fit(model, tokenizer, prompts, method=SMALL, readout=readout)


def test_the_reference_s_span() -> None:
    text = Rendered("", tuple(range(10)), 6, ())
    assert Readout.parse("predicting_mean").tokens(text) == range(5, 9)
    assert Readout.parse("response_mean").tokens(text) == range(6, 10)


def test_activations_that_are_not_finite_are_refused() -> None:
    model, vector = fitted("llama")
    sites = list(vector.reads)
    rows = {site: draw(2, 48 if site.kind == "mlp_post" else 32) for site in sites}
    acts = Activations(rows, {**rows, sites[0]: torch.full_like(rows[sites[0]], float("nan"))}, readout="response_mean")
    with pytest.raises(FitError, match="not finite"):
        fit(model, byte_tokenizer(CHATML), data_for(SMALL), method=SMALL, acts=acts)


# Weights it belongs to


def test_another_model_s_weights_are_refused() -> None:
    model, vector = fitted("llama")
    assert set(vector.extra["weights"]) == {linear.parameter for linear in linears_at(model, vector.sites).values()}
    assert SteeringVector.from_bytes(vector.to_bytes()).extra == vector.extra
    vector.check(model)
    other = build("llama", seed=1)
    for use in (steerkit.steer, steerkit.edited):
        with pytest.raises(VectorMismatchError, match="other weights"), use(other, vector):
            pass
    with steerkit.edited(model, vector), pytest.raises(VectorMismatchError, match="edited already"):
        steerkit.steer(model, vector)
    steerkit.steer(model, vector)
    with pytest.raises(VectorMismatchError, match="GPT2LMHeadModel has not"):
        check_weights(build("gpt2"), vector.extra["weights"])


def test_the_same_checkpoint_in_bfloat16_is_the_same() -> None:
    model, vector = build("llama"), fitted("llama")[1]
    half = copy.deepcopy(model).to(torch.bfloat16)
    with steerkit.steer(half, vector):
        assert bool(torch.isfinite(modes.plain_logits(half, modes.SHORT)).all())
    names = weight_digests(half, vector.sites)
    assert names == dict(vector.extra["weights"])


@pytest.mark.parametrize("way", ["in place", "through data", "replaced"])
def test_a_changed_weight_is_noticed_however_it_was_changed(way: str) -> None:
    model, vector = build("llama"), fitted("llama")[1]
    vector.check(model)
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        if way == "in place":
            weight[3, 5] += 1
        elif way == "through data":
            weight.data.mul_(1.1)
        else:
            model.model.layers[1].mlp.down_proj.weight = nn.Parameter(weight * 2)
    with pytest.raises(VectorMismatchError, match=r"layers\.1\.mlp\.down_proj"):
        vector.check(model)


def test_offloaded_weights_are_refused() -> None:
    from accelerate import cpu_offload

    model, vector = build("llama"), fitted("llama")[1]
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(VectorMismatchError, match="offloaded"):
        vector.check(model)
    with pytest.raises(ModelError, match="offloaded"):
        fit(model, byte_tokenizer(CHATML), data_for(SMALL), method=SMALL)


def test_one_weight_in_two_blocks_is_refused() -> None:
    model = build("llama")
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    with pytest.raises(SiteError, match="add up"):
        linears_at(model, [Site(1, "mlp_out"), Site(2, "mlp_out")])


def test_adapters_take_part_in_what_is_scored_and_stay_when_edited() -> None:
    """The matrix that acts is base plus adapter; what is edited, and identified, is the base."""
    model, _ = fitted("llama_peft")
    (linear,) = linears_at(model, [Site(1, "attn_out")]).values()
    wrapper = linear.tap.module
    acting = wrapper.base_layer.weight + wrapper.get_delta_weight("default")
    torch.testing.assert_close(linear.weight(torch.float32), acting.detach(), atol=1e-5, rtol=0)
    assert linear.parameter == "model.layers.1.self_attn.o_proj.weight"


def test_an_adapter_that_rescales_has_no_weight_form() -> None:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["o_proj"], use_dora=True))
    vector = fit(model, byte_tokenizer(CHATML), data_for(SMALL), method=SMALL)
    baseline = modes.plain_logits(model, modes.SHORT)
    with steerkit.steer(model, vector):
        assert not torch.allclose(modes.plain_logits(model, modes.SHORT), baseline)
    with pytest.raises(SiteError, match="rescales"), steerkit.edited(model, vector):
        pass
    assert torch.equal(modes.plain_logits(model, modes.SHORT), baseline)


class Packed(nn.Module):
    """A linear layer as quantisers make them: whole numbers and a scale, no weight that lies open."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def test_quantised_layers_are_read_and_steered_but_not_written() -> None:
    model = build("opt")
    for layer in model.model.decoder.layers:
        layer.fc2 = Packed(layer.fc2)
    (linear,) = linears_at(model, [Site(1, "mlp_out")]).values()
    packed = linear.tap.module
    torch.testing.assert_close(linear.weight(torch.float32), packed.weight * packed.scale, atol=1e-6, rtol=1e-5)
    vector = fit(model, byte_tokenizer(CHATML), data_for(SMALL), method=SMALL)
    assert any(site.kind == "mlp_out" for site in vector.sites)
    baseline = modes.plain_logits(model, modes.SHORT)
    with steerkit.steer(model, vector):
        assert not torch.allclose(modes.plain_logits(model, modes.SHORT), baseline)
    with pytest.raises(ModelError, match="quantised"), steerkit.edited(model, vector):
        pass
    packed.weight[0, 0] += 1
    with pytest.raises(VectorMismatchError, match="other weights"):
        vector.check(model)


# The file, and what stands beside the edit


def test_what_a_file_cannot_hold_is_refused() -> None:
    _, vector = fitted("llama")
    method, site = SMALL, vector.sites[0]
    params = vector.params(site)
    method.check(site, params)
    for change in ({"gate": None}, {"magnitude": None}, {"magnitude": torch.ones(5)}, {"gate": torch.ones(2, 16)}):
        changed = {name: value for name, value in {**params, **change}.items() if value is not None}
        with pytest.raises(VectorMismatchError, match="gate"):
            method.check(site, changed)
    with pytest.raises(VectorMismatchError, match="linear layer writes"):
        method.check(Site(1, "resid_post"), params)


def test_it_has_no_length() -> None:
    model, vector = fitted("llama")
    with pytest.raises(StrengthError, match="length"):
        steerkit.steer(model, vector, 1.0, unit="norm")


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_the_control_is_as_large_and_learned_nothing(family: str) -> None:
    _, vector = fitted(family)
    control = SMALL.control(vector, torch.Generator().manual_seed(0))
    assert control.tensors.keys() == vector.tensors.keys()
    for site in vector.sites:
        one, other = vector.params(site), control.params(site)
        assert torch.equal(one["magnitude"], other["magnitude"])
        for name in ("direction", "gate"):
            torch.testing.assert_close(one[name].norm(), other[name].norm())
        for name in {"gate", "shared_gate"} & one.keys():
            count = one[name.replace("gate", "magnitude")].numel()
            torch.testing.assert_close(
                one[name].reshape(count, -1).norm(dim=1), other[name].reshape(count, -1).norm(dim=1)
            )
            assert one[name].shape == other[name].shape and (count == 4 or not torch.equal(one[name], other[name]))
        assert abs(float(one["direction"] @ other["direction"])) < 0.8


@pytest.mark.filterwarnings("ignore:.*is fitted on as well")  # the items differ in their answers alone
def test_held_out_items_are_separated_along_every_direction() -> None:
    model, tokenizer = fitted("llama")[0], byte_tokenizer(CHATML)
    items = [("What was it like?", f" {good}.", f" {bad}.") for good, bad in PAIRS]
    train, rest = ContrastSet.from_answers(items[:2]), ContrastSet.from_answers(items[2:])
    vector = fit(model, tokenizer, train, method=SMALL, held_out=rest)
    assert set(vector.held_out["sites"]) == {str(site) for site in vector.sites}


def test_streamed_and_kept_activations_give_one_vector() -> None:
    model, vector = fitted("gpt2")
    acts = record(model, byte_tokenizer(CHATML), data_for(SMALL), vector.reads, readout="response_mean")
    again = fit(model, byte_tokenizer(CHATML), data_for(SMALL), method=SMALL, acts=acts)
    for name, tensor in vector.tensors.items():
        torch.testing.assert_close(tensor, again.tensors[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "family", mostly_slow(["opt", "gemma2", "gpt_neox", "falcon", "gpt_oss"], ["falcon", "gpt_oss"])
)
def test_conformance_on_more_families(family: str) -> None:
    for finding in conformance(SMALL, build(family), byte_tokenizer(CHATML), data_for(SMALL), strength=2.0):
        assert finding.passed, finding


def crafted() -> SteeringVector:
    """Two heads and three neurons; neurons whose gates have the other sign than their magnitudes."""
    magnitudes = {"attn_out.1": [0.0, 2.0, -0.5, 0.0], "mlp_out.2": [0.0, -3.0, 4.0, -1.0]}
    signs = {"attn_out.1": torch.ones(4), "mlp_out.2": torch.tensor([1.0, -1.0, -1.0, 1.0])}
    tensors = {}
    for name, values in magnitudes.items():
        width = 2 if name.startswith("attn") else 1
        inputs = signs[name][:, None].expand(4, width) / width**0.5
        tensors[f"{name}/magnitude"] = torch.tensor(values)
        tensors[f"{name}/gate"] = (torch.tensor(values)[:, None] * inputs).flatten()
        tensors[f"{name}/direction"] = torch.eye(8)[0]
    return SteeringVector(
        method="steer2edit", tensors=tensors, sites=(Site(1, "attn_out"), Site(2, "mlp_out")), edit="rank_one",
        scope="all", unit="paper", model_type="llama", hidden_size=8, num_layers=4, settings=SMALL.settings,
    )  # fmt: skip


def test_the_table_and_the_maps_say_reinforce_or_suppress() -> None:
    listing = SMALL.table(crafted())
    assert listing.title == "2 heads, 3 neurons edited"
    rounded = [(*row[:3], round(float(row[3]), 4), row[4]) for row in listing.rows]
    assert rounded == [
        (2, "mlp", "1 neuron", 4.0, "reinforce"),
        (2, "mlp", "2 neurons", 3.1623, "suppress"),
        (1, "attn", "head 1", 2.0, "reinforce"),
        (1, "attn", "head 2", 0.5, "suppress"),
    ]
    heads, neurons = SMALL.maps(crafted())
    assert (heads.title, dict(heads.rows)) == ("heads", {1: [0.0, 2.0, -0.5, 0.0]})
    assert (neurons.title, dict(neurons.rows)) == ("neurons", {2: [4.0, -1.0, -3.0]})
    assert (heads.above, heads.below) == ("reinforce", "suppress")


def test_inspect_lists_and_draws_the_parts(cli: Any, answer: Any, here: Path) -> None:
    crafted().save("edit.safetensors")
    parts = answer("inspect", "edit.safetensors")["parts"]
    assert parts["rows"][0] == {"layer": 2, "block": "mlp", "edited": "1 neuron", "gate": 4.0, "what": "reinforce"}
    ended = cli("inspect", "edit.safetensors", "--plot", "map.svg")
    assert ended.code == 0 and "wrote map.svg" in ended.err and "head 1" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    assert Path("map.svg").read_text(encoding="utf-8").startswith("<?xml")
    before = Path("map.svg").read_bytes()
    cli("inspect", "edit.safetensors", "--plot", "map.svg")
    assert Path("map.svg").read_bytes() == before
    ended = cli("inspect", "v.safetensors", "--plot", "other.png")
    assert ended.code == 1 and "no parts" in ended.err and not Path("other.png").exists()


def test_layers_worth_trying() -> None:
    assert Steer2Edit.candidates(8) == [tuple(range(8)), (2, 3, 4, 5)]
    assert Steer2Edit.candidates(1) == [(0,)]
