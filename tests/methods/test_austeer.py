"""AUSteer against its reference outputs, against slow, obvious forms, and at the edges its specification lists."""

from __future__ import annotations

import functools
import gc
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import steerkit
from steerkit.activations.moments import PairSigns
from steerkit.activations.recording import record
from steerkit.errors import DataError, FitError, SiteError, StrengthError, VectorMismatchError
from steerkit.evaluate.controls import refits
from steerkit.evaluate.curve import random_like
from steerkit.fitting.fitting import read
from steerkit.maths import edits
from steerkit.methods._registry import method_of
from steerkit.methods.austeer import AUSteer, activation_momentum, select_neurons
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.rendering import render
from steerkit.vector.steering_vector import SteeringVector
from tests import modes, tolerances
from tests.families import BLOCKS, HIDDEN, build
from tests.pairwise import pairwise
from tests.program import Cli
from tests.tiny_tokenizers import CHATML, byte_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = {"attention": "z", "ffn": "mlp_raw", "layer": "resid_post"}
CASES = [(arch, module) for arch in ("llama", "gemma2", "qwen3") for module in KINDS] + [("qwen3_moe", "attention")]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@functools.cache
def arrays() -> dict[str, Tensor]:
    return load_file(GOLDEN / "austeer.safetensors")


@functools.cache
def notes() -> dict[str, Any]:
    return json.loads((GOLDEN / "austeer.json").read_text(encoding="utf-8"))["notes"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The counts and the order, bit for bit


def groups() -> list[str]:
    return ["momentum", *(f"e2e.{arch}.{module}" for arch, module in CASES)]


@pytest.mark.parametrize("group", groups())
def test_shares_and_order_are_the_reference_s_bit_for_bit(group: str) -> None:
    beta = activation_momentum(arrays()[f"{group}.pos"], arrays()[f"{group}.neg"])
    assert beta.dtype == torch.float32
    assert torch.equal(beta.double(), arrays()[f"{group}.scores"])
    order = arrays()["select.order" if group == "momentum" else f"{group}.order"]
    assert [(layer, unit) for layer, unit, _ in select_neurons(beta, len(order))] == [(a, b) for a, b in order.tolist()]


@pytest.mark.parametrize("group", groups())
def test_the_streamed_counts_are_the_same(group: str) -> None:
    positive, negative = arrays()[f"{group}.pos"].float(), arrays()[f"{group}.neg"].float()
    for layer in range(positive.shape[1]):
        signs = PairSigns(torch.float16)
        for rows in (slice(0, 5), slice(5, 5), slice(5, 12)):
            signs.update(positive[rows, layer], negative[rows, layer])
        found = signs.result()
        found[0][1], found[1][1] = 0.0, 0.0  # the crafted arrays hold infinities, which the effect is not finite for
        counts = PairSigns.read(*found)
        share = torch.maximum(counts.up, counts.down) / counts.pairs
        signed = torch.where(counts.down > counts.up, -share, share)
        assert torch.equal(signed.double(), arrays()[f"{group}.scores"][layer])


def test_shares_in_their_slow_form() -> None:
    positive, negative = draw(9, 3, 5).round(decimals=0), draw(9, 3, 5, seed=1).round(decimals=0)
    for tie in ("positive", "negative"):
        expected = torch.zeros(3, 5)
        ties = 0
        for layer in range(3):
            for unit in range(5):
                up = sum(float(positive[row, layer, unit]) > float(negative[row, layer, unit]) for row in range(9))
                down = sum(float(positive[row, layer, unit]) < float(negative[row, layer, unit]) for row in range(9))
                ties += up == down
                is_down = down > up or (down == up and tie == "negative")
                expected[layer, unit] = (-down if is_down else up) / 9
        assert ties, "the case has no tie"
        assert torch.equal(activation_momentum(positive, negative, tie=tie), expected)  # type: ignore[arg-type]


def test_the_worked_example() -> None:
    """12 pairs: ups, downs and zeros as the specification lists them."""
    for up, down, share in ((6, 6, 0.5), (5, 5, 5 / 12), (4, 5, -5 / 12), (12, 0, 1), (0, 12, -1), (11, 0, 11 / 12)):
        column = torch.tensor([1.0] * up + [-1.0] * down + [0.0] * (12 - up - down))[:, None, None]
        assert float(activation_momentum(column, torch.zeros_like(column))) == pytest.approx(share, abs=1e-7)


def test_the_order_in_its_slow_form() -> None:
    beta = draw(4, 7).mul(3).round() / 5
    flat = [(layer, unit, float(beta[layer, unit])) for layer in range(4) for unit in range(7)]
    expected = sorted((one for one in flat if one[2]), key=lambda one: -abs(one[2]))
    assert len(expected) < 28, "the case has no zero"
    for k in (0, 1, 5, len(expected), 28, 100):
        assert select_neurons(beta, k) == expected[:k]


@pytest.mark.parametrize("k", [0, 1, 2, 3, 6, 10, 46, 48, 60])
@pytest.mark.parametrize("alpha", [1, 15, 100])
def test_gains_are_the_reference_s_bit_for_bit(k: int, alpha: int) -> None:
    beta = activation_momentum(arrays()["momentum.pos"], arrays()["momentum.neg"])
    chosen = select_neurons(beta, k)
    assert len(chosen) == min(k, notes()["select.nonzero_units"])
    if k == 0:  # departs from the reference, whose k = 0 selects one unit, as k = 1 does
        chosen = select_neurons(beta, 1)
    assert torch.equal(gammas(chosen, beta.shape, alpha), arrays()[f"select.mask.k{k}.alpha{alpha}"])


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("alpha", [7, 15])
def test_gains_are_rounded_once(name: str, alpha: int) -> None:
    beta = activation_momentum(arrays()["momentum.pos"], arrays()["momentum.neg"])
    found = gammas(select_neurons(beta, 46), beta.shape, alpha, DTYPES[name])
    expected = arrays()[f"select.mask_{name}.k46.alpha{alpha}"]
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def gammas(
    chosen: list[tuple[int, int, float]], shape: torch.Size, alpha: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[l, d] as the released settings prepare it for hooks."""
    rows = []
    for layer in range(shape[0]):
        own = [(unit, beta) for place, unit, beta in chosen if place == layer]
        if not own:
            rows.append(torch.zeros(shape[1], dtype=dtype))
            continue
        params = params_of([unit for unit, _ in own], [beta for _, beta in own], shape[1])
        prepared = AUSteer.published().prepare(params, torch.tensor(float(alpha)), dtype, torch.device("cpu"))
        rows.append(prepared["gamma"])
    return torch.stack(rows)


def params_of(units: list[int], beta: list[float], width: int) -> dict[str, Tensor]:
    return {"units": torch.tensor(units), "beta": torch.tensor(beta), "width": torch.tensor(width)}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("alpha", ["0.5", "15", "100"])
def test_the_scaling_is_the_reference_s(name: str, alpha: str) -> None:
    x = arrays()["apply.x"].to(DTYPES[name])
    before = x.clone()
    gamma = (float(alpha) * arrays()["apply.beta_layer0"]).float().to(DTYPES[name])
    found, expected = edits.scale_units(x, gamma), arrays()[f"apply.y.{name}.alpha{alpha}"]
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert torch.equal(x, before)
    assert bool(torch.isinf(expected).any()) == (name == "fp16" and alpha == "100")


# From end to end on the reference's tiny models


@functools.cache
def reference_model(arch: str, folder: Path) -> Any:
    weights = {
        name.removeprefix(f"e2e.{arch}.weights."): value.clone()
        for name, value in arrays().items()
        if name.startswith(f"e2e.{arch}.weights.")
    }
    config = tf.AutoConfig.for_model(arch, **notes()[f"e2e.{arch}.config"])
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


@pytest.fixture
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    folder = tmp_path_factory.getbasetemp() / "austeer"

    def load(arch: str) -> Any:
        (folder / arch).mkdir(parents=True, exist_ok=True)
        return reference_model(arch, folder / arch)

    return load


@functools.cache
def words() -> Any:
    """A tokenizer whose text `w7 w12` is the ids 7 and 12."""
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0")


def reference_data() -> ContrastSet:
    sides = [
        [
            " ".join(f"w{token}" for token in row[:length])
            for row, length in zip(arrays()[f"data.{side}_ids"].tolist(), arrays()["data.lens"].tolist(), strict=True)
        ]
        for side in ("pos", "neg")
    ]
    return ContrastSet.from_prompts(*sides, raw=True)


def reference_vector(model: Any, arch: str, module: str) -> SteeringVector:
    """The reference's first six units."""
    group, decoder = f"e2e.{arch}.{module}", find_decoder(model)
    width = arrays()[f"{group}.scores"].shape[1]
    tensors: dict[str, Tensor] = {}
    chosen = arrays()[f"{group}.order"][: notes()["e2e"]["k"]].tolist()
    taps = locate(model, [Site(layer, KINDS[module]) for layer in range(decoder.num_layers)])
    for layer, site in enumerate(taps):
        units = [unit for place, unit in chosen if place == layer]
        if units:
            own = params_of(units, arrays()[f"{group}.scores"][layer, units].tolist(), width)
            tensors |= {f"{site}/{name}": value for name, value in own.items()}
    return SteeringVector(
        suggested_strength=1.0,
        method="austeer",
        tensors=tensors,
        sites=tuple(site for site in taps if f"{site}/units" in tensors),
        edit="scale_units",
        scope="all",
        unit="paper",
        settings=AUSteer.published(kind=KINDS[module], k=6).settings,
        model_type=decoder.model_type,
        hidden_size=decoder.hidden_size,
        num_layers=decoder.num_layers,
    )


@pytest.mark.parametrize(("arch", "module"), CASES)
@pytest.mark.parametrize("batch_size", [2, 24])
def test_the_published_settings_choose_the_reference_s_units(
    arch: str, module: str, batch_size: int, reference: Callable[[str], Any]
) -> None:
    """Read by our own hooks, several texts at once where the reference reads one: the same units, shares and gains."""
    group, model = f"e2e.{arch}.{module}", reference(arch)
    method = AUSteer.published(kind=KINDS[module], k=notes()["e2e"]["k"])
    vector = steerkit.fit(model, words(), reference_data(), method=method, batch_size=batch_size)
    expected = reference_vector(model, arch, module)
    assert vector.sites == expected.sites
    mask = arrays()[f"{group}.mask"]
    for site in vector.sites:
        found = method.prepare(vector.params(site), torch.tensor(4.0), torch.float32, torch.device("cpu"))
        assert torch.equal(found["gamma"], mask[site.layer])
    others = set(range(len(mask))) - {site.layer for site in vector.sites}
    assert not any(bool(mask[layer].any()) for layer in others)


@pytest.mark.parametrize(("arch", "module"), CASES)
def test_steered_activations_and_logits_are_the_reference_s(
    arch: str, module: str, reference: Callable[[str], Any]
) -> None:
    group, model = f"e2e.{arch}.{module}", reference(arch)
    vector, prompt = reference_vector(model, arch, module), arrays()["data.prompt_ids"]
    tolerance = tolerances.tolerance(model, prompt)
    places = [Site(layer, KINDS[module]) for layer in range(vector.num_layers)]
    seen: dict[Site, Tensor] = {}
    with torch.no_grad():
        close(model(prompt, use_cache=False).logits, arrays()[f"e2e.{arch}.logits_base"], tolerance)
        with steerkit.steer(model, vector, notes()["e2e"]["alpha"]):
            handles = [watch(tap, seen) for tap in locate(model, places).values()]
            logits = model(prompt, use_cache=False).logits
            for handle in handles:
                handle.remove()
            out = model.generate(
                prompt, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
    close(logits, arrays()[f"{group}.logits_steered"], tolerance)
    for site, found in seen.items():
        close(found, arrays()[f"{group}.site_post"][site.layer], tolerance)
    assert torch.equal(out.sequences, arrays()[f"{group}.gen_steered"])
    close(torch.stack(out.logits, dim=1), arrays()[f"{group}.gen_step_logits"], tolerance)
    assert not torch.equal(logits, arrays()[f"e2e.{arch}.logits_base"])


@pytest.mark.parametrize(("arch", "module"), CASES)
def test_the_written_site_from_its_value_before(arch: str, module: str) -> None:
    group = f"e2e.{arch}.{module}"
    for layer, gamma in enumerate(arrays()[f"{group}.mask"]):
        found = edits.scale_units(arrays()[f"{group}.site_pre"][layer], gamma)
        assert torch.equal(found, arrays()[f"{group}.site_post"][layer])


def watch(tap: Any, seen: dict[Site, Tensor]) -> Any:
    def keep(h: Tensor) -> None:
        seen[tap.site] = h.clone()

    if tap.side == "input":
        return tap.module.register_forward_pre_hook(
            lambda _module, args, kwargs: keep(tap.read(args, kwargs)), with_kwargs=True
        )
    return tap.module.register_forward_hook(lambda _module, _args, output: keep(tap.read((), {}, output)))


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    worst = float((found - expected).abs().max() / expected.abs().max())
    assert worst <= tolerance, f"off by {worst:.1e}"


# The whole method in its slow form


PAIRS = (
    ("It rains today. ", "Good, the garden drinks.", "Bad, the walk is off."),
    ("The bus is late. ", "I can read on.", "I waste my morning again here."),
    ("We lost the game. ", "We learned a lot from it.", "We are no good."),
    ("A letter came. ", "News from a friend!", "A bill, surely."),
    ("The shop is shut. ", "Then we cook at home.", "Nothing ever works."),
    ("My phone broke. ", "A quiet day, then.", "All is lost now."),
)


def answers(pairs: tuple[tuple[str, str, str], ...] = PAIRS) -> ContrastSet:
    return ContrastSet.from_answers(list(pairs))


@functools.cache
def model_of(family: str = "llama") -> Any:
    return build(family)


def tokenizer() -> Any:
    return byte_tokenizer(CHATML)


def slow_units(model: Any, data: ContrastSet, kind: str, k: int) -> list[tuple[Site, int, float]]:
    """One text at a time, one unit at a time, ranked by share, then by the standardised mean difference."""
    sites = list(locate(model, [Site(layer, kind) for layer in range(BLOCKS)]))
    read_one = [
        [record(model, tokenizer(), [text], sites, batch_size=1) for text in side]
        for side in (data.positive, data.negative)
    ]
    found = []
    for site in sites:
        rows = [[acts.positive[site][0].double() for acts in side] for side in read_one]
        for unit in range(len(rows[0][0])):
            apart = [float(one[unit] - other[unit]) for one, other in zip(*rows, strict=True)]
            up, down = sum(value > 0 for value in apart), sum(value < 0 for value in apart)
            mean = sum(apart) / len(apart)
            spread = math.sqrt(sum((value - mean) ** 2 for value in apart) / len(apart))
            share = -down / len(apart) if down > up else up / len(apart)
            found.append((site, unit, share, abs(mean) / spread))
    found.sort(key=lambda one: (-abs(one[2]), -one[3]))
    return [(site, unit, share) for site, unit, share, _ in found[:k]]


def units_of(vector: SteeringVector) -> list[tuple[Site, int, float]]:
    return [
        (site, *one)
        for site in vector.sites
        for one in zip(vector.params(site)["units"].tolist(), vector.params(site)["beta"].tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("kind", "family"),
    pairwise(
        ["z", "mlp_raw", "resid_post"],
        ["llama", "gpt2", "qwen3", "gemma2", "phi3", "qwen3_moe", "falcon", "bloom"],
        strength=1,
        always=[("z", "qwen3"), ("mlp_raw", "gemma2"), ("mlp_raw", "qwen3_moe"), ("resid_post", "falcon")],
    ),
)
def test_the_chosen_units_in_their_slow_form(family: str, kind: str) -> None:
    """Head width times heads other than the model's width, grouped queries, fused projections, norms after the MLP,
    routed experts (their combined output), parallel halves: what is read is what the site's name says everywhere."""
    model = model_of(family)
    vector = steerkit.fit(model, tokenizer(), answers(), method=AUSteer(kind=kind, k=17), batch_size=6)  # type: ignore[arg-type]
    expected = slow_units(model, answers(), kind, 17)
    found = units_of(vector)
    assert {(site, unit) for site, unit, _ in found} == {(site, unit) for site, unit, _ in expected}
    shares = {(site, unit): share for site, unit, share in expected}
    assert all(share == pytest.approx(shares[site, unit]) for site, unit, share in found)
    assert len(vector.reads) == BLOCKS
    if family == "qwen3" and kind == "z":
        assert int(vector.params(vector.sites[0])["width"]) == 64 != HIDDEN


@pytest.mark.parametrize("kind", ["z", "mlp_raw", "resid_post"])
def test_every_token_is_written_as_by_a_loop(kind: str) -> None:
    """Token by token and unit by unit, at a site whose input nothing else steers."""
    model = model_of("qwen3")
    vector = steerkit.fit(model, tokenizer(), answers(), method=AUSteer(kind=kind, k=30, flip=True))  # type: ignore[arg-type]
    site = vector.sites[0]  # what comes before it is as without steering
    (tap,) = locate(model, [site]).values()
    seen: dict[Site, Tensor] = {}
    handle = watch(tap, seen)
    modes.plain_logits(model, modes.LONG)
    expected = seen[site].clone()
    for token in range(expected.shape[1]):
        for unit, beta in zip(vector.params(site)["units"].tolist(), vector.params(site)["beta"].tolist(), strict=True):
            expected[0, token, unit] *= 1 + 3.0 * beta
    handle.remove()
    with steerkit.steer(model, vector, 3.0):
        handle = watch(tap, seen)
        modes.plain_logits(model, modes.LONG)
        handle.remove()
    torch.testing.assert_close(seen[site], expected)


# Edges, by the specification's numbers


def test_e1_equal_activations_count_for_neither_side_but_stay_in_the_denominator() -> None:
    positive = torch.tensor([1.0, 1.0, 1.0, 2.0])[:, None, None]
    negative = torch.tensor([1.0, 1.0, 1.0, 1.0])[:, None, None]
    assert float(activation_momentum(positive, negative)) == 0.25
    # Differences of rounding size, as padding to another length makes them, are none either.
    signs, published = PairSigns(rounding=1e-5), PairSigns(torch.float16)
    for one in (signs, published):
        one.update(torch.tensor([[1.0], [1000.0]]), torch.tensor([[1.0 + 1e-6], [999.0]]))
        counts = PairSigns.read(*one.result())
        assert [float(part) for part in counts[:3]] == [1, 0, 2]


def test_e1_pairs_of_which_no_expert_took_a_text_do_not_count() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 1.0]])
    others = torch.tensor([[0.5, 1.0], [1.0, 1.0], [1.0, 2.0]])
    routed, every = PairSigns(skip_zeros=True), PairSigns(torch.float16)
    for one in (routed, every):
        one.update(rows, others)
    counts = PairSigns.read(*routed.result())
    assert [part.tolist() for part in counts[:3]] == [[2, 0], [0, 2], [2, 2]]
    assert PairSigns.read(*every.result()).pairs.tolist() == [3, 3]
    method = AUSteer()
    assert method.statistics(Site(0))._skip_zeros
    assert not AUSteer.published().statistics(Site(0))._skip_zeros


def test_e2_e3_what_is_not_finite_counts_as_the_reference_counts_it() -> None:
    """inf - inf and nan for neither, inf - finite for its side; nothing is raised here."""
    inf, nan = math.inf, math.nan
    positive = torch.tensor([inf, inf, nan, 1.0, -inf])[:, None, None]
    negative = torch.tensor([inf, 1.0, 1.0, nan, 1.0])[:, None, None]
    assert float(activation_momentum(positive, negative)) == pytest.approx(0.2)
    huge = torch.tensor([[70000.0], [70000.0]])
    published = PairSigns(torch.float16)
    published.update(huge, torch.tensor([[80000.0], [1.0]]))  # inf - inf, inf - 1
    assert [float(part) for part in PairSigns.read(*published.result())[:3]] == [1, 0, 2]
    wide = PairSigns()
    wide.update(huge, torch.tensor([[80000.0], [1.0]]))
    assert [float(part) for part in PairSigns.read(*wide.result())[:3]] == [1, 1, 2]


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("method", [AUSteer(), AUSteer.published()])
def test_e3_the_method_refuses_what_is_not_finite_with_the_site_named(value: float, method: AUSteer) -> None:
    model = build("llama")
    (token,) = byte_tokenizer(None, bos=False)("Z")["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[token, 0] = value  # the words of one pair only
    data = answers((*PAIRS, ("Z? ", "Well.", "Badly.")))
    with pytest.raises(FitError, match=r"z\.0: activations are not finite"):
        steerkit.fit(model, tokenizer(), data, method=method)


def test_e4_a_dead_unit_is_never_chosen() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    every = steerkit.fit(model, tokenizer(), answers(), method=AUSteer(k=10_000))
    assert Site(1, "z") not in every.sites
    assert len(units_of(every)) == 3 * HIDDEN
    assert all(share for _, _, share in units_of(every))
    beta = torch.tensor([[0.0, 0.5], [math.nan, -0.0]])
    assert select_neurons(beta, 4) == [(0, 1, 0.5)]


def test_e5_the_units_that_tie_at_the_cut_are_reported() -> None:
    model = model_of()
    vector = steerkit.fit(model, tokenizer(), answers(), method=AUSteer(k=5))
    full = steerkit.fit(model, tokenizer(), answers(), method=AUSteer(k=10_000))
    last = min(abs(share) for _, _, share in units_of(vector))
    tied = sum(abs(share) == last for _, _, share in units_of(full))
    taken = sum(abs(share) == last for _, _, share in units_of(vector))
    assert tied > taken
    assert vector.tensors["shared/tied"].tolist() == [tied, taken]
    listing = method_of(vector).table(vector)
    assert listing is not None
    assert listing.note.startswith(f"{tied} neurons")


def test_e6_saturated_units_are_ranked_by_how_far_they_move() -> None:
    """A refusal that is always the same: most units of every layer reach share 1, and order alone would be depth."""
    pairs = tuple((prompt, "I'm sorry, but no.", bad) for prompt, _, bad in PAIRS[:3])
    found = {}
    for rule in ("order", "difference"):
        vector = steerkit.fit(model_of(), tokenizer(), answers(pairs), method=AUSteer(k=12, tie_break=rule))  # type: ignore[arg-type]
        tied, taken = vector.tensors["shared/tied"].tolist()
        assert tied > taken == 12
        found[rule] = units_of(vector)
    assert {site.layer for site, _, _ in found["order"]} == {0, 1}
    assert max(site.layer for site, _, _ in found["difference"]) > 1
    expected = slow_units(model_of(), answers(pairs), "z", 12)
    assert {(site, unit) for site, unit, _ in found["difference"]} == {(site, unit) for site, unit, _ in expected}


def test_e7_answers_on_both_sides_are_balanced() -> None:
    labels = [("Yes", "No")] * 6 + [("No", "Yes")] * 2 + [("free text", "another")] * 3
    data = ContrastSet.from_answers([(f"Question {row}? ", *pair) for row, pair in enumerate(labels)])
    kept = AUSteer().contrast(data)
    assert [item.prompt for item in kept.positive] == [f"Question {row}? " for row in (0, 1, 6, 7, 8, 9, 10)]
    assert [item.prompt for item in kept.negative] == [item.prompt for item in kept.positive]
    assert AUSteer(balance=False).contrast(data) == data
    one_sided = ContrastSet.from_answers([(f"Question {row}? ", "Yes", "No") for row in range(4)])
    assert AUSteer().contrast(one_sided) == one_sided
    # A unit that tells nothing but the answer has the share of the commoner one, and none when they are balanced.
    seen = steerkit.fit(model_of(), tokenizer(), data, method=AUSteer(balance=False))
    balanced = steerkit.fit(model_of(), tokenizer(), data, method=AUSteer())
    assert seen.data_digest == balanced.data_digest == data.digest
    assert units_of(seen) != units_of(balanced)


def test_e8_scaling_goes_away_from_zero_and_not_towards_the_positive_side() -> None:
    """The positive side has the larger but negative values: share +1 pushes them down."""
    beta = activation_momentum(torch.full((3, 1, 1), -1.0), torch.full((3, 1, 1), -2.0))
    assert float(beta) == 1.0
    assert float(edits.scale_units(torch.tensor([-1.0]), 2.0 * beta[0])) == -3.0


def test_e10_one_layer_and_one_token() -> None:
    """The reference squeezes axes of size 1 away and fails."""
    config = tf.LlamaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).eval()
    assert "IndexError" in notes()["single_layer_model"]
    data = ContrastSet.from_prompts(["a", "b"], ["c", "d"], raw=True)
    vector = steerkit.fit(model, byte_tokenizer(None, bos=False), data, method=AUSteer(k=3, template=False))
    assert len(units_of(vector)) == 3
    assert activation_momentum(torch.ones(1, 1, 1), torch.zeros(1, 1, 1)).tolist() == [[1.0]]


@pytest.mark.parametrize("kind", ["z", "mlp_raw", "resid_post"])
def test_e11_padding_changes_nothing(kind: str) -> None:
    one, other = (
        steerkit.fit(model_of(), tokenizer(), answers(), method=AUSteer(kind=kind), batch_size=size)  # type: ignore[arg-type]
        for size in (1, 12)
    )
    assert units_of(one) == units_of(other)


def test_e12_no_pairs() -> None:
    with pytest.raises(FitError, match="at least one pair"):
        activation_momentum(torch.zeros(0, 1, 1), torch.zeros(0, 1, 1))
    with pytest.raises(FitError, match="at least one pair"):
        activation_momentum(torch.zeros(2, 1, 1), torch.zeros(3, 1, 1))
    with pytest.raises(FitError, match="no pair"):
        PairSigns().result()
    with pytest.raises(FitError, match="are no pairs"):
        PairSigns().update(torch.zeros(2, 1), torch.zeros(3, 1))
    for loose in (
        ContrastSet.from_prompts(["a", "b"], ["c"], raw=True),
        ContrastSet.from_prompts(["a", "b"], ["c", "d"], raw=True, paired=False),
    ):
        with pytest.raises(DataError, match="pairs"):
            steerkit.fit(model_of(), tokenizer(), loose, method="austeer")


def test_e13_units_that_are_not_chosen_stay_infinite() -> None:
    """The reference multiplies all of them, and inf times 0 is nan."""
    h = torch.tensor([math.inf, -math.inf, math.nan, 700.0], dtype=torch.float16)
    found = edits.scale_units(h, torch.tensor([0.0, 0.0, 0.0, 100.0], dtype=torch.float16))
    assert found[:2].tolist() == [math.inf, -math.inf]
    assert found[2].isnan()
    assert found[3] == math.inf
    wide = edits.scale_units(h.bfloat16(), torch.tensor([0.0, 0.0, 0.0, 100.0], dtype=torch.bfloat16))
    assert math.isfinite(float(wide[3]))


def test_e14_zeros_stay_what_they_are() -> None:
    h, gamma = torch.tensor([0.0, -0.0, 0.0, -0.0]), torch.tensor([2.0, 2.0, 0.0, 0.0])
    found = edits.scale_units(h, gamma)
    assert torch.equal(torch.signbit(found), torch.signbit(h))
    assert not found.any()


def test_e16_strength_zero_is_nothing_and_a_negative_one_mirrors() -> None:
    params = params_of([1, 3], [0.75, -0.5], 5)
    flipping = AUSteer(flip=True)

    def gamma(method: AUSteer, strength: float | list[float]) -> Tensor:
        value = torch.tensor(strength)
        value = value if value.dim() == 0 else value[:, None, None]
        return method.prepare(params, value, torch.float32, torch.device("cpu"))["gamma"]

    assert gamma(flipping, 4.0).tolist() == [0, 3, 0, -2, 0]
    assert gamma(flipping, -4.0).tolist() == [0, -3, 0, 2, 0]
    assert not gamma(flipping, 0.0).any()
    # The default never turns a sign: factors stop at 0.
    assert gamma(AUSteer(), 4.0).tolist() == [0, 3, 0, -1, 0]
    assert gamma(AUSteer(), -4.0).tolist() == [0, -1, 0, 2, 0]
    assert gamma(AUSteer(), [4.0, 1.0]).tolist() == [[[0, 3, 0, -1, 0]], [[0, 0.75, 0, -0.5, 0]]]


def test_e18_the_tensor_before_the_edit_is_left_alone() -> None:
    h = draw(1, 2, 5)
    before = h.clone()
    edits.scale_units(h, torch.full((5,), 2.0))
    assert torch.equal(h, before)


def test_e22_the_last_layer_s_stream_is_read_before_the_final_norm() -> None:
    model = model_of()
    sites = AUSteer(kind="resid_post").sites(find_decoder(model))
    assert sites == [Site(layer) for layer in range(BLOCKS)]
    (tap,) = locate(model, sites[-1:]).values()
    assert tap.module is model.model.layers[-1]


def test_texts_are_cut_at_the_right() -> None:
    """Two answers that differ behind 512 tokens read the same, as in the reference; by default all is read."""
    assert notes()["over_512_tokens_pair_identical"]
    long = "one two three " * 60
    data = ContrastSet.from_answers([(f"{row} {long}", "yes, of course", "no, not at all") for row in range(3)])
    config = tf.LlamaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).eval()
    with pytest.raises(FitError, match="no pair moves any neuron"):
        steerkit.fit(model, tokenizer(), data, method=AUSteer.published())
    assert units_of(steerkit.fit(model, tokenizer(), data, method=AUSteer(k=3)))
    rows = [
        record(model, tokenizer(), ["abcdefgh"], [Site(1)], max_tokens=limit).positive[Site(1)] for limit in (3, None)
    ]
    assert not torch.equal(*rows)
    with pytest.raises(DataError, match="at least 1"):
        record(model, tokenizer(), ["abcdefgh"], [Site(1)], max_tokens=0)


def test_no_template_and_refusals_alone() -> None:
    data = ContrastSet.from_answers(
        [("PROMPT ", "\nI'm sorry, but I can't assist with that.", "\nbad"), ("Other ", "good", "bad")]
    )
    case = notes()["refusal_special_case"]
    kept = AUSteer.published(alone="I'm sorry, but I can't assist").contrast(data)
    texts = [render(byte_tokenizer(CHATML), item).text for item in (*kept.positive, *kept.negative)]
    assert texts == [*case["positive"], "Other good", *case["negative"], "Other bad"]
    plain = AUSteer.published().contrast(data)
    assert plain.positive[0].prompt == "PROMPT "
    chat = ContrastSet.from_answers([([{"role": "user", "content": "Hello"}], "good", "bad")])
    with pytest.raises(DataError, match="template"):
        AUSteer.published().contrast(chat)
    assert AUSteer().contrast(chat) == chat


# Settings and errors


@pytest.mark.parametrize(
    "settings",
    [{"k": 0}, {"k": True}, {"k": -1}, {"kind": "mlp_post"}, {"tie": "none"}, {"tie_break": "x"}, {"max_tokens": -1}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(FitError, match="austeer"):
        AUSteer(**settings)


def test_select_neurons_refuses_what_it_cannot_rank() -> None:
    for beta, k in ((torch.zeros(3), 1), (torch.zeros(1, 3), -1), (torch.zeros(1, 3), 1.5), (torch.zeros(1, 3), True)):
        with pytest.raises(FitError, match="select_neurons"):
            select_neurons(beta, k)  # type: ignore[arg-type]
    with pytest.raises(FitError, match="positive nor negative"):
        activation_momentum(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), tie="down")  # type: ignore[arg-type]


def test_sites_of_several_kinds_are_refused() -> None:
    with pytest.raises(FitError, match="one kind"):
        steerkit.fit(model_of(), tokenizer(), answers(), method="austeer", sites=["z.1", "mlp_raw.1"])


def test_activations_that_were_not_streamed_are_refused() -> None:
    sites = AUSteer().sites(find_decoder(model_of()))
    acts = record(model_of(), tokenizer(), answers(), sites)
    with pytest.raises(FitError, match="no counts of pairs"):
        steerkit.fit(model_of(), tokenizer(), answers(), method="austeer", acts=acts)


def test_a_family_without_the_kind_is_refused() -> None:
    with pytest.raises(SiteError, match="mixer_out"):
        steerkit.fit(model_of("mamba"), tokenizer(), answers(), method="austeer")
    some = AUSteer().sites(find_decoder(model_of("qwen3_next")))
    assert some, "of a hybrid model the blocks that have it"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"units": torch.tensor([1, 1])}, "different"),
        ({"units": torch.tensor([1, 99])}, "different ones of 0"),
        ({"units": torch.tensor([-1, 2])}, "different ones of 0"),
        ({"units": torch.tensor([1, 2, 3])}, "as wide as"),
        ({"units": torch.tensor([1.0, 2.0])}, "whole numbers"),
    ],
)
def test_a_vector_whose_units_do_not_fit_is_refused(change: dict[str, Tensor], match: str) -> None:
    params = {**params_of([1, 2], [0.5, 1.0], 32), **change}
    with pytest.raises(VectorMismatchError, match=match):
        AUSteer().check(Site(0, "z"), params)
    with pytest.raises(VectorMismatchError, match=r"needs 'beta' \[j\], the vector has none"):
        AUSteer().check(Site(0, "z"), {"units": torch.tensor([1])})


def test_the_unit_norm_is_refused() -> None:
    vector = steerkit.fit(model_of(), tokenizer(), answers(), method="austeer")
    with pytest.raises(StrengthError, match="norm"):
        steerkit.steer(model_of(), vector, 1.0, unit="norm")


# The file holds the units and nothing dense


def test_the_file_holds_k_triples() -> None:
    vector = steerkit.fit(model_of(), tokenizer(), answers(), method=AUSteer(k=7))
    assert sum(len(vector.params(site)["units"]) for site in vector.sites) == 7
    assert max(tensor.numel() for tensor in vector.tensors.values()) <= 7
    loaded = SteeringVector.from_bytes(vector.to_bytes())
    assert loaded == vector
    assert method_of(loaded) == AUSteer(k=7)


def test_inspect_lists_the_units(cli: Cli, answer: Callable[..., Any], tmp_path: Path) -> None:
    vector = steerkit.fit(model_of("qwen3"), tokenizer(), answers(), method=AUSteer(k=23))
    path = vector.save(tmp_path / "units.safetensors")
    parts = answer("inspect", path)["parts"]
    assert parts["title"] == "23 neurons"
    found = {(row["layer"], 16 * row["head"] + row["dimension"]): (row["sign"], row["share"]) for row in parts["rows"]}
    assert found == {
        (site.layer, unit): ("+" if share > 0 else "-", abs(share)) for site, unit, share in units_of(vector)
    }
    assert [row["share"] for row in parts["rows"]] == sorted((row["share"] for row in parts["rows"]), reverse=True)
    shown = cli("inspect", path).out
    assert "and 3 more; --json lists all" in shown
    assert "head" in shown
    assert "neurons have the smallest" in shown
    assert max(map(len, shown.splitlines())) <= 80 + len(str(path))
    rows = steerkit.fit(model_of("qwen3"), tokenizer(), answers(), method=AUSteer(kind="mlp_raw", k=4))
    listing = method_of(rows).table(rows)
    assert listing is not None
    assert listing.columns == ("layer", "row", "sign", "share")
    caa = answer("inspect", modes.vector_for(model_of(), scope="all").save(tmp_path / "caa.safetensors"))
    assert caa["parts"] is None


# Controls


def test_the_control_is_as_many_random_units_with_the_same_gains() -> None:
    vector = steerkit.fit(model_of(), tokenizer(), answers(), method=AUSteer(k=40))
    drawn = [random_like(vector, seed=seed) for seed in range(30)]
    for one in drawn:
        assert one.sites == vector.sites
        for site in vector.sites:
            own, other = vector.params(site), one.params(site)
            assert torch.equal(own["beta"], other["beta"])
            method_of(one).check(site, other)
    site = max(vector.sites, key=lambda site: len(vector.params(site)["units"]))
    seen = {int(unit) for one in drawn for unit in one.params(site)["units"]}
    assert seen == set(range(HIDDEN)), "every unit of the site can be drawn"
    assert any(not torch.equal(one.params(site)["units"].sort().values, vector.params(site)["units"]) for one in drawn)


def test_fits_on_shuffled_labels() -> None:
    vector = steerkit.fit(model_of(), tokenizer(), answers(), method=AUSteer(k=9))
    found = refits(model_of(), tokenizer(), answers(), vector, shuffled=2, halves=1, resamples=1)
    assert len(found.shuffled) == 2
    assert all(len(units_of(one)) == 9 for one in found.shuffled)
    with steerkit.steer(model_of(), found.shuffled[0], 1.0):
        modes.plain_logits(model_of(), modes.SHORT)


# The exact weight form

FOLDED = ("llama", "gpt2", "qwen3", "gemma2", "phi3", "gpt_neox", "opt", "falcon", "bloom")


@pytest.mark.parametrize(("strength", "kind", "family"), pairwise([0.7, 15.0], ["z", "mlp_raw"], FOLDED))
def test_folded_equals_hooked(family: str, kind: str, strength: float) -> None:
    model = build(family)
    vector = steerkit.fit(model, tokenizer(), answers(), method=AUSteer(kind=kind, k=40))  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    baseline = modes.plain_logits(model, modes.LONG)
    with steerkit.steer(model, vector, strength):
        hooked = modes.plain_logits(model, modes.LONG)
    with steerkit.edited(model, vector, strength):
        folded = modes.plain_logits(model, modes.LONG)
    assert float((folded - hooked).abs().max() / hooked.abs().max()) < tolerances.of_family(family)
    assert float((hooked - baseline).abs().max()) > 1e-2
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_what_is_folded_is_columns_of_one_and_rows_of_the_other() -> None:
    for family, attention, mlp in (
        ("llama", "self_attn.o_proj", "mlp.down_proj"),
        ("gpt2", "attn.c_proj", "mlp.c_proj"),
    ):
        model = model_of(family)
        parameters = dict(model.named_parameters())
        for kind, name in (("z", attention), ("mlp_raw", mlp)):
            vector = steerkit.fit(model, tokenizer(), answers(), method=AUSteer(kind=kind, k=10, flip=True))  # type: ignore[arg-type]
            updates = method_of(vector).weight_updates(model, vector, 4.0)
            assert len(updates) == len(vector.sites) * (2 if family == "gpt2" and kind == "mlp_raw" else 1)
            for update in updates:
                path, _, leaf = update.name.rpartition(".")
                assert path.endswith(name)
                layer = int(next(part for part in path.split(".") if part.isdigit()))
                (site,) = (site for site in vector.sites if site.layer == layer)
                old = parameters[update.name].detach()
                expected = old.clone()
                for unit, beta in zip(*(vector.params(site)[one].tolist() for one in ("units", "beta")), strict=True):
                    if leaf == "bias":
                        expected[unit] *= 1 + 4 * beta
                    elif (kind == "z") == (family == "llama"):  # GPT-2 holds its weights transposed
                        expected[:, unit] *= 1 + 4 * beta
                    else:
                        expected[unit] *= 1 + 4 * beta
                torch.testing.assert_close(update.update(old), expected)


@pytest.mark.parametrize(
    ("family", "site", "match"),
    [
        ("llama", "resid_post.1", "no linear layer"),
        ("gemma2", "mlp_out.1", "post-norm"),
        ("llama", "attn_out.1", "no linear layer"),
        ("qwen3_moe", "mlp_raw.1", "experts"),
        ("llama_peft", "z.1", "adapter"),
        ("llama_peft", "mlp_raw.1", "adapter"),
    ],
)
def test_what_no_weight_can_do_is_refused(family: str, site: str, match: str) -> None:
    model = build(family)
    vector = steerkit.fit(model, tokenizer(), answers(), method="austeer", sites=[site])
    with pytest.raises(SiteError, match=match), steerkit.edited(model, vector, 1.0):
        pass


@pytest.mark.slow
def test_compiled_and_changed_in_strength() -> None:
    model = build("llama")
    vector = steerkit.fit(model, tokenizer(), answers(), method=AUSteer(k=12))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with steerkit.steer(compiled, vector, 2.0) as steering:
        for strength in (2.0, -1.0):
            steering.strength = strength
            with steerkit.steer(model, vector, strength):
                pass
            found = modes.plain_logits(compiled, modes.LONG)
            with steerkit.edited(model, vector, strength):
                pass
            expected = by_hand(vector, strength)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def by_hand(vector: SteeringVector, strength: float) -> Tensor:
    """Logits of the folded twin."""
    twin = build("llama")
    with steerkit.edited(twin, vector, strength):
        return modes.plain_logits(twin, modes.LONG)


# Memory


def held(model: Any) -> int:
    """Bytes of all floating tensors alive, those of the model left out."""
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor and thing.is_floating_point() and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for place, size in storages.items() if place not in own)


def growth(pairs: int, method: AUSteer, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most that reading some pairs holds beyond what was there, looked at in every batch."""
    model = model_of()
    sites = method.sites(find_decoder(model))
    texts = [f"{row:04d}" for row in range(pairs)]
    data = ContrastSet.from_prompts([f"a {text}" for text in texts], [f"b {text}" for text in texts], raw=True)
    gc.collect()
    before, most = held(model), 0
    from steerkit.activations import reading as activations

    real = activations.forward_body

    def run(*args: Any) -> None:
        nonlocal most
        real(*args)
        most = max(most, held(model) - before)

    monkeypatch.setattr(activations, "forward_body", run)
    read(model, tokenizer(), data, method=method, sites=sites, batch_size=50)
    monkeypatch.setattr(activations, "forward_body", real)
    return most


@pytest.mark.slow
def test_reading_a_thousand_pairs_holds_no_more_than_a_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (growth(pairs, AUSteer(), monkeypatch) for pairs in (100, 1000))
    assert large <= small
    monkeypatch.setattr(AUSteer, "statistics", lambda _method, _site: None)  # what the test is for: samples are kept
    kept_small, kept_large = (growth(pairs, AUSteer(), monkeypatch) for pairs in (100, 1000))
    samples = 2 * 900 * 4 * HIDDEN * BLOCKS
    assert kept_large - kept_small >= samples, "what is measured would not notice samples"


def test_what_is_held_at_a_site_does_not_grow() -> None:
    signs = PairSigns()
    sizes = []
    for _ in range(3):
        signs.update(draw(64, 20), draw(64, 20, seed=1))
        sizes.append(sum(value.nbytes for value in vars(signs).values() if isinstance(value, Tensor)))
    assert sizes == [5 * 20 * 4] * 3


# On the command line


def test_the_commands_take_it(here: Path, cli: Cli, tiny: Path) -> None:
    recipe = Path("joy-caa.toml").read_text(encoding="utf-8").replace("layers = [1, 2]", 'name = "austeer"')
    Path("joy-austeer.toml").write_text(recipe, encoding="utf-8")
    vector = "out/joy-austeer.safetensors"
    few = ("--texts", 2, "--neutral", 2)
    own = ("--vector", vector, "--data", "joy.jsonl", "--model", tiny, "--max-new-tokens", 4, *few)
    for words in (
        ("demo", "--recipe", "joy-austeer.toml", "--out", "out"),
        ("evaluate", *own),
        ("report", *own, "--out", "out/page.html"),
    ):
        ended = cli(*words)
        assert ended.code == 0, ended.err
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="format alone")  # the items are few and all alike
        ended = cli("calibrate", "joy-austeer.toml", "--layers", "0+1+2+3", "--strengths", "1", *few)
    assert not ended.err
    assert ended.code == 0 or "nothing works" in ended.out  # of a random model nothing has to
