"""Latents against the long form: encode, change, decode, add the error back; token by token in float64."""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.checks.contract import CHECKS, conformance
from steerkit.dictionary import Dictionary, load_dictionary
from steerkit.dictionary.activation import ACTIVATIONS
from steerkit.errors import FitError, StrengthError, UnknownNameError, VectorMismatchError
from steerkit.methods import _latent_reading
from steerkit.methods.latent import Latent
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.neutral import neutral_texts
from steerkit.prompts.rendering import render
from steerkit.vector.steering_vector import SteeringVector
from tests import modes
from tests.choices import mostly_slow
from tests.dictionary.made import long_form, made
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer(CHATML)
WIDTH, LATENTS, PLACE = 32, 40, Site(1)
OPS = ("add", "clamp", "scale", "ablate")
CHOSEN = (3, 17, 29)
AMOUNTS = (1.0, 0.5, 2.0)
IDS = torch.tensor([modes.LONG])
DATA = ContrastSet.from_prompts(["a bright day", "all is well", "yes!"], ["a dull day", "it rains", "no?"], raw=True)
NO_TOKENS: Any = None


def stored(folder: Path, activation: str = "jumprelu", **changes: Any) -> tuple[str, Dictionary]:
    one = made(activation, site=changes.pop("site", PLACE), width=WIDTH, latents=LATENTS, **changes)
    path = one.save(folder / f"{activation}.safetensors")
    return str(path), one


def fitted(path: str, model: Any = None, **settings: Any) -> SteeringVector:
    settings = {"dictionary": path, "latents": CHOSEN, "amounts": AMOUNTS, **settings}
    return steerkit.fit(build("llama") if model is None else model, TOKENIZER, DATA, method="latent", settings=settings)


@functools.cache
def stream() -> Tensor:
    """What the tiny model has at the site, [2, 8, d], all of it far from every threshold's rounding."""
    seen: list[Tensor] = []
    model: Any = build("llama")
    handle = find_decoder(model).blocks[1].register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))
    with torch.no_grad():
        model(input_ids=torch.tensor([modes.LONG[:8], modes.LONG[8:16] if len(modes.LONG) > 15 else modes.LONG[-8:]]))
    handle.remove()
    return seen[0]


def slow(h: Tensor, one: Dictionary, op: str, strength: float, amounts: Tensor, *, by_token: bool = False) -> Tensor:
    """Encode, change the chosen latents, decode, and add what the dictionary misses, in float64."""
    rows = h.double().reshape(-1, h.shape[-1])
    before = long_form(one, rows)
    after = before.clone()
    for place, latent in enumerate(CHOSEN):
        unit = before.max(dim=-1).values if by_token else torch.ones(len(rows), dtype=torch.float64)
        wanted = strength * float(amounts[place]) * unit
        after[:, latent] = {
            "add": before[:, latent] + wanted,
            "clamp": wanted,
            "scale": strength * before[:, latent],
            "ablate": (1 - strength) * before[:, latent],
        }[op]
    decoder = one.decoder.double() / one.input_scale
    error = rows - before @ decoder
    return (after @ decoder + error).reshape(h.shape)


def edited(vector: SteeringVector, h: Tensor, strength: float | Tensor) -> Tensor:
    method = Latent.from_settings(vector.settings)
    prepared = method.prepare(
        vector.params(vector.sites[0]), torch.as_tensor(strength, dtype=torch.float32), h.dtype, h.device
    )
    return method.edit(h, prepared, NO_TOKENS)


# the operator


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("moved", [{}, {"subtract": True, "input_scale": 1.7}], ids=["plain", "moved"])
def test_it_is_the_long_form(op: str, activation: str, moved: Mapping[str, Any], tmp_path: Path) -> None:
    path, one = stored(tmp_path, activation, **moved)
    vector = fitted(path, op=op)
    h = stream()
    found = edited(vector, h, 1.5)
    expected = slow(h, one, op, 1.5, vector.params(PLACE)["amounts"])
    assert float((found.double() - expected).abs().max()) <= 1e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("op", ["add", "clamp"])
def test_a_token_s_own_strongest_latent_is_the_unit(op: str, tmp_path: Path) -> None:
    path, one = stored(tmp_path, "topk")
    vector = fitted(path, op=op, unit="token")
    h = stream()
    expected = slow(h, one, op, 0.8, torch.tensor(AMOUNTS), by_token=True)
    assert float((edited(vector, h, 0.8).double() - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    for row in range(len(h)):  # over the row, never over the batch
        alone = edited(vector, h[row : row + 1], 0.8)
        torch.testing.assert_close(edited(vector, h, 0.8)[row : row + 1], alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "gated", "topk"])
def test_ablation_leaves_tokens_without_the_latents_bitwise(activation: str, tmp_path: Path) -> None:
    path, one = stored(tmp_path, activation)
    vector = fitted(path, op="ablate")
    h = stream().clone()
    h[0, 0] = -h[0, 0] * 0.0  # negative zeros stay negative
    fires = (one.encode(h)[..., list(CHOSEN)] > 0).any(dim=-1)
    assert bool(fires.any())
    assert not bool(fires.all())
    found = edited(vector, h, 1.0)
    assert torch.equal(found[~fires].view(torch.int32), h[~fires].view(torch.int32))
    assert bool((found[fires] != h[fires]).any(dim=-1).all())


def test_a_latent_that_reads_what_it_writes_is_clamped_once_and_for_all(tmp_path: Path) -> None:
    """Twice is once where an encoder row makes 1 of its own decoder row and 0 of the others, and not in general."""
    draw = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw)).Q
    rows = torch.cat([basis, basis])[:LATENTS]
    changes = {"encoder": rows, "decoder": rows, "encoder_bias": torch.zeros(LATENTS)}
    for op in ("clamp", "ablate"):
        path, _ = stored(tmp_path, "relu", **changes)
        vector = fitted(path, op=op)
        h = (stream() @ basis.T).abs() @ basis  # all latents fire: of one that does not, more is missing than v
        once = edited(vector, h, 1.0)
        assert float((edited(vector, once, 1.0) - once).abs().max()) <= 1e-6 * float(h.abs().max())
    path, _ = stored(tmp_path, "relu")
    vector = fitted(path, op="clamp")
    once = edited(vector, stream(), 1.0)
    assert float((edited(vector, once, 1.0) - once).abs().max()) > 1e-3


@pytest.mark.parametrize("op", OPS)
def test_a_neutral_strength_is_the_model_itself(op: str, tmp_path: Path) -> None:
    path, _ = stored(tmp_path)
    model: Any = build("llama")
    vector = fitted(path, op=op)
    neutral = Latent.from_settings(vector.settings).neutral_strength
    assert neutral == {"add": 0.0, "clamp": None, "scale": 1.0, "ablate": 0.0}[op]
    if neutral is None:
        return
    with torch.no_grad():
        baseline = model(input_ids=IDS.repeat(2, 1)).logits
        for strength in (neutral, [neutral, 2.5]):
            with steerkit.steer(model, vector, strength, scope="all"):
                found = model(input_ids=IDS.repeat(2, 1)).logits
            assert torch.equal(found[0], baseline[0])
        assert not torch.equal(found[1], baseline[1])


# what every method promises, in every form


@pytest.mark.parametrize("settings", [{"op": op, "unit": unit} for op in OPS for unit in ("peak", "token")], ids=str)
def test_every_form_keeps_the_promises(settings: dict[str, Any], tmp_path: Path) -> None:
    path, _ = stored(tmp_path, "relu", encoder_bias=torch.zeros(LATENTS))
    method = Latent.from_settings({"dictionary": path, "latents": CHOSEN, **settings})
    found = conformance(method, build("llama"), TOKENIZER, DATA, strength=3.0)
    assert len(found) == len(CHECKS) + 3
    wrong = [one for one in found if not one.passed and one.check != "positive_side_lies_further_along"]
    assert not wrong, wrong


FAMILIES = ["gpt2", "llama", "gemma2", "qwen3", "gpt_neox"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("op", mostly_slow(["add", "clamp"], ["clamp"]))
def test_cached_is_uncached_is_padded_on_five_families(family: str, op: str, tmp_path: Path) -> None:
    path, _ = stored(tmp_path, "jumprelu", encoder_bias=torch.zeros(LATENTS))
    model = build(family)
    assert find_decoder(model).hidden_size == WIDTH
    method = Latent.from_settings({"dictionary": path, "latents": CHOSEN, "op": op})
    found = {one.check: one for one in conformance(method, model, TOKENIZER, DATA, strength=2.0)}
    for check in ("rows_are_independent", "cached_equals_uncached", "steering_changes_the_logits"):
        assert found[check].passed, found[check]


def test_the_addition_is_a_bias_like_any_other(tmp_path: Path) -> None:
    path, _ = stored(tmp_path)
    model: Any = build("gpt2")
    vector = fitted(path, model).at(scope="all")
    with torch.no_grad():
        with steerkit.steer(model, vector, 1.5):
            hooked = model(input_ids=IDS).logits
        with steerkit.edited(model, vector, 1.5):
            assert float((model(input_ids=IDS).logits - hooked).abs().max()) < 1e-5 * float(hooked.abs().max())
    plain = SteeringVector.from_directions({1: vector.params(PLACE)["direction"]}, model, scope="all")
    with torch.no_grad(), steerkit.steer(model, plain, 1.5):
        assert torch.equal(model(input_ids=IDS).logits, hooked)


def test_compiled_whole_and_not_again_for_another_strength(tmp_path: Path) -> None:
    torch._dynamo.reset()
    path, _ = stored(tmp_path, "relu", encoder_bias=torch.zeros(LATENTS))
    model: Any = build("llama")
    vector = fitted(path, model, op="clamp").at(scope="all")
    calls: list[int] = []

    def backend(graph: Any, _inputs: Any, **_options: Any) -> Any:
        calls.append(1)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad(), steerkit.steer(model, vector, 1.0) as steering:
        compiled(IDS)
        before = len(calls)
        for value in (1.0, 0.0, 1.4):
            steering.strength = value
            got = compiled(IDS).logits
            with torch.compiler.set_stance("force_eager"):
                assert float((got - model(IDS).logits).abs().max()) < 1e-5
    assert len(calls) == before
    torch._dynamo.reset()


def test_rows_have_their_own_strength(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, "relu", encoder_bias=torch.zeros(LATENTS))
    model: Any = build("llama")
    for op, unit in (("clamp", "peak"), ("add", "token")):
        vector = fitted(path, model, op=op, unit=unit).at(scope="all")
        single = []
        with torch.no_grad():
            for strength in (0.5, 2.0):
                with steerkit.steer(model, vector, strength):
                    single.append(model(input_ids=IDS).logits[0])
            with steerkit.steer(model, vector, [0.5, 2.0]):
                found = model(input_ids=IDS.repeat(2, 1)).logits
        for row in (0, 1):
            assert float((found[row] - single[row]).abs().max()) < 1e-5
        assert float((single[0] - single[1]).abs().max()) > 1e-4


# the file


def test_a_file_needs_no_dictionary_but_where_all_latents_count(tmp_path: Path) -> None:
    for activation, settings, needs in (
        ("jumprelu", {"op": "clamp"}, False),
        ("batchtopk", {"op": "ablate"}, False),
        ("topk", {"op": "add"}, False),
        ("topk", {"op": "ablate"}, True),
        ("jumprelu", {"unit": "token"}, True),
    ):
        folder = tmp_path / f"{activation}-{'-'.join(settings.values())}"
        path, _ = stored(folder, activation)
        model: Any = build("llama")
        file = fitted(path, model, **settings).to_bytes()
        gc.collect()  # a dictionary stays in memory as long as a vector that was steered with
        Path(path).unlink()
        if not needs:
            with steerkit.steer(model, SteeringVector.from_bytes(file), 1.0):
                continue
        missing = r"cannot be read .*; this vector reads all of its latents"
        with (
            pytest.raises(VectorMismatchError, match=missing),
            steerkit.steer(model, SteeringVector.from_bytes(file), 1.0),
        ):
            pass
        stored(folder, activation, seed=9)
        with (
            pytest.raises(VectorMismatchError, match="is another one"),
            steerkit.steer(model, SteeringVector.from_bytes(file), 1.0),
        ):
            pass


def test_a_whole_dictionary_is_read_and_placed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = stored(tmp_path, "topk")
    model: Any = build("llama")
    vector = fitted(path, model, unit="token").at(scope="all", fade="linear over 4")
    read: list[str] = []

    def load(name: str, **options: Any) -> Dictionary:
        read.append(name)
        return load_dictionary(name, **options)

    monkeypatch.setattr(_latent_reading, "load_dictionary", load)
    monkeypatch.setattr(_latent_reading, "placed_rows", Mock(wraps=_latent_reading.placed_rows))
    for again in (1.0, 0.5):  # a fade prepares anew in every pass
        with torch.no_grad(), steerkit.steer(model, vector, again):
            model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert read == [path]
    assert _latent_reading.placed_rows.call_count == 1  # type: ignore[attr-defined]


def test_the_peak_is_the_usual_strongest_latent(tmp_path: Path) -> None:
    path, one = stored(tmp_path)
    model: Any = build("llama")
    vector = fitted(path, model, latents=[5], amounts=[2.0])
    found: list[float] = []
    for text in neutral_texts()[:24]:
        ids = render(TOKENIZER, text).ids[:128]
        seen: list[Tensor] = []
        handle = find_decoder(model).blocks[1].register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out[0]))
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        handle.remove()
        found += one.encode(seen[0][1:]).max(dim=-1).values.tolist()
    peak = sorted(found)[(len(found) - 1) // 2]
    params = vector.params(PLACE)
    assert float(params["peak"]) == pytest.approx(peak, rel=1e-5)
    torch.testing.assert_close(params["direction"], 2.0 * peak * one.decoder[5], rtol=1e-5, atol=1e-6)
    assert fitted(path, model, latents=[5], amounts=[2.0], unit="raw").params(PLACE)["amounts"].tolist() == [2.0]


def test_without_names_the_latents_of_the_data_are_taken(tmp_path: Path) -> None:
    path, one = stored(tmp_path, "relu", encoder_bias=torch.zeros(LATENTS))
    model: Any = build("llama")
    vector = steerkit.fit(model, TOKENIZER, DATA, method="latent", settings={"dictionary": path, "count": 2})
    acts = steerkit.record(model, TOKENIZER, DATA, [PLACE], readout="last")
    on, off = (one.encode(side[PLACE]) for side in (acts.positive, acts.negative))
    gaps = [
        (
            int((on[:, latent] > 0).sum() - (off[:, latent] > 0).sum()),  # as many texts on either side
            float(on[:, latent].mean() - off[:, latent].mean()),
            -latent,
        )
        for latent in range(LATENTS)
    ]
    best = sorted(range(LATENTS), key=lambda latent: gaps[latent], reverse=True)
    wanted = [latent for latent in best if gaps[latent][1] > 0][:2]
    assert vector.params(PLACE)["latents"].tolist() == wanted


def test_the_control_writes_random_rows_as_long(tmp_path: Path) -> None:
    path, _ = stored(tmp_path)
    vector = fitted(path, op="clamp")
    control = Latent.from_settings(vector.settings).control(vector, torch.Generator().manual_seed(1))
    own, other = vector.params(PLACE), control.params(PLACE)
    torch.testing.assert_close(own["decoder"].norm(dim=-1), other["decoder"].norm(dim=-1))
    assert float(torch.cosine_similarity(own["decoder"], other["decoder"], dim=-1).abs().max()) < 0.6
    assert torch.equal(own["encoder"], other["encoder"])
    torch.testing.assert_close(other["direction"], other["amounts"] @ other["decoder"])


# refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"latents": [3, 3]}, "names one twice"),
        ({"latents": [-1]}, "whole numbers"),
        ({"latents": ["a"]}, "whole numbers"),
        ({"latents": [1], "amounts": [1.0, 2.0]}, "2 amounts for 1 latents"),
        ({"latents": [1], "amounts": [float("nan")]}, "finite"),
        ({"count": 0}, "1 or more"),
        ({"op": "remove"}, "'remove'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(FitError, match=said):
        Latent.from_settings(settings)


def test_what_cannot_be_fitted_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    path, _ = stored(tmp_path)
    with pytest.raises(FitError, match="names none"):
        steerkit.fit(model, TOKENIZER, DATA, method="latent")
    with pytest.raises(FitError, match="latents 0 to 39"):
        fitted(path, latents=[40], amounts=[1.0])
    with pytest.raises(FitError, match=r"reads resid_post.1, not resid_post.2"):
        steerkit.fit(model, TOKENIZER, DATA, method="latent", layers=[2], settings={"dictionary": path})
    narrow = str(made(width=16, site=PLACE).save(tmp_path / "narrow.safetensors"))
    with pytest.raises(FitError, match="32 wide, the dictionary reads 16"):
        fitted(narrow)
    with pytest.raises(UnknownNameError, match="'dictionry'"):
        steerkit.fit(model, TOKENIZER, DATA, method="latent", settings={"dictionry": path})


@pytest.mark.parametrize("settings", [{"op": "clamp"}, {"unit": "token"}], ids=str)
def test_what_reads_every_token_has_no_form_as_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    path, _ = stored(tmp_path)
    model = build("llama")
    vector = fitted(path, model, **settings).at(scope="all")
    with pytest.raises(StrengthError, match="no exact weight form"), steerkit.edited(model, vector, 1.0):
        pass
    with pytest.raises(StrengthError, match="has not"):
        steerkit.steer(model, vector, 1.0, unit="norm")
    with pytest.raises(StrengthError, match="plane"):
        Latent.from_settings(vector.settings).rank_two(vector.params(PLACE))


def test_a_vector_without_its_digest_is_refused(tmp_path: Path) -> None:
    path, _ = stored(tmp_path)
    vector = fitted(path, unit="token")
    tensors = {name: value for name, value in vector.tensors.items() if not name.endswith("/digest")}
    with pytest.raises(VectorMismatchError, match="needs 'digest'"):
        steerkit.steer(build("llama"), replace(vector, tensors=tensors), 1.0)
    assert load_dictionary(path).digest
