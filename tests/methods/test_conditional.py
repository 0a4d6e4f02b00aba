"""Conditional steering: scores, the threshold search, rules, and a vector fitted on planted data."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import steerkit
from steerkit.errors import FitError, SiteError, UnknownNameError, VectorMismatchError
from steerkit.maths.predicates import P, Predicate, fired
from steerkit.methods._fingerprint import fingerprint, fits
from steerkit.methods._gated_addition import folds_of
from steerkit.methods._thresholds import best_threshold, score
from steerkit.methods.conditional import ConditionalSteering, combine
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.rendering import spread
from steerkit.vector.steering_vector import SteeringVector
from tests.choices import mostly_slow
from tests.families import FAMILIES, build
from tests.gated import LONG, SHORT, gated_vector
from tests.tiny_tokenizers import CHATML, byte_tokenizer

HARMFUL = [f"how would one break into the {place} at night" for place in ("bank", "shop", "house", "museum", "office")]
HARMLESS = [f"how would one walk around the {place} at noon" for place in ("lake", "park", "garden", "village", "hill")]


def data() -> ContrastSet:
    return ContrastSet.from_prompts(HARMFUL, HARMLESS)


def fitted(**settings: Any) -> tuple[Any, Any, SteeringVector]:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    return model, tokenizer, steerkit.fit(model, tokenizer, data(), method="conditional", settings=settings)


def cast_by_matrix(h: Tensor, c: Tensor) -> Tensor:
    """The paper's form: the projection matrix written out, one activation at a time."""
    matrix = torch.outer(c, c) / torch.dot(c, c)
    rows = []
    for one in h:
        projected = torch.tanh(matrix @ one)
        rows.append(torch.dot(one, projected) / (one.norm() * projected.norm()))
    return torch.stack(rows)


def test_acceptance_10_the_rank_one_score_is_the_matrix_score() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 1.0, 30.0):
        h = size * torch.randn(50, 64, generator=generator)
        c = torch.randn(64, generator=generator)
        assert (score(h, c, "cast") - cast_by_matrix(h.double(), c.double())).abs().max() < 1e-6
        expected = torch.nn.functional.cosine_similarity(h, c[None])
        assert (score(h, c) - expected).abs().max() < 1e-6
        small = 1e-3 * h / size
        assert (score(small, c, "cast") - expected.abs()).abs().max() < 1e-4, "without the tanh it is |cos|"


def test_acceptance_10_orthogonal_and_zero_activations_score_zero_and_not_nan() -> None:
    c, h = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert bool(cast_by_matrix(h[:1], c).isnan().all()), "what the guard is for"
    for kind in ("cosine", "cast"):
        found = score(h, c, kind)  # type: ignore[arg-type]
        assert found[:2].tolist() == [0.0, 0.0]
        assert found[2] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["cosine", "cast"])
def test_acceptance_10_above_and_below_are_exact_complements(kind: str) -> None:
    model = build("llama")
    vector = gated_vector(model)
    vector = SteeringVector(**{**_fields(vector), "settings": {"score": kind}})
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(64, 32, generator=generator)
    h[0] = 0
    scores = score(h, vector.tensors["shared/condition"][0], kind)  # type: ignore[arg-type]
    for value in scores.double().tolist():  # thresholds that are hit exactly
        met = []
        for above in (True, False):
            changed = {"shared/threshold": torch.tensor([value]).double(), "shared/above": torch.tensor([above])}
            one = SteeringVector(**{**_fields(vector), "tensors": {**vector.tensors, **changed}})
            gate = ConditionalSteering.from_settings(one.settings).editor(one)
            met.append(gate.decide({Site(3): h}).is_open)
        assert torch.equal(met[0], ~met[1])
        assert torch.equal(met[0], scores > value)


def _fields(vector: SteeringVector) -> dict[str, Any]:
    from dataclasses import fields

    return {entry.name: getattr(vector, entry.name) for entry in fields(vector)}


def by_force(positive: list[float], negative: list[float], max_fpr: float | None, side: str) -> tuple[float, float]:
    """Best F1 and, among the best, the widest margin, trying every cut there is."""
    values = sorted({*positive, *negative})
    cuts = [values[0] - 1, *[(low + high) / 2 for low, high in itertools.pairwise(values)], values[-1] + 1]
    found = []
    for cut in cuts:
        hits = sum((value > cut) == (side == "above") for value in positive)
        alarms = sum((value > cut) == (side == "above") for value in negative)
        if max_fpr is None or alarms / len(negative) <= max_fpr:
            margin = min(abs(value - cut) for value in values) if values[0] < cut < values[-1] else 0.0
            found.append((2 * hits / (hits + alarms + len(positive)), margin))
    return max(found)


@pytest.mark.parametrize("max_fpr", [None, 0.0, 0.1, 0.35])
@pytest.mark.parametrize("side", ["above", "below"])
def test_acceptance_11_the_search_finds_the_optimum_of_brute_force(max_fpr: float | None, side: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        counts = torch.randint(1, 15, (2,), generator=generator).tolist()
        scale = (1.0, 1e-4, 4.0)[trial % 3]
        positive, negative = (
            scale * torch.randn(count, generator=generator) + shift * scale
            for count, shift in zip(counts, (0.8, 0.0), strict=True)
        )
        if trial % 3 == 2:  # many ties
            positive, negative = positive.round(), negative.round()
        found = best_threshold(positive, negative, max_fpr=max_fpr, compare=side)
        expected = by_force(positive.double().tolist(), negative.double().tolist(), max_fpr, side)
        assert found.f1 == pytest.approx(expected[0], abs=1e-12)
        assert found.margin == pytest.approx(expected[1], abs=1e-12)
        met = [(side == "above") == (values.double() > found.value) for values in (positive, negative)]
        assert found.tpr == pytest.approx(float(met[0].double().mean()))
        assert found.fpr == pytest.approx(float(met[1].double().mean()))
        if max_fpr is not None:
            assert found.fpr <= max_fpr


def test_the_search_keeps_full_precision_and_takes_the_better_side() -> None:
    low, high = (torch.tensor(values, dtype=torch.double) for values in ([0.1, 0.10000001], [0.10000003, 0.2]))
    found = best_threshold(high, low)
    assert (found.f1, found.compare) == (1.0, "above")
    assert 0.10000001 < found.value < 0.10000003
    assert best_threshold(low, high).compare == "below"
    neighbours = torch.tensor([1.0, 1.0 + 2**-52], dtype=torch.double)
    touching = best_threshold(neighbours[1:], neighbours[:1])
    assert touching.f1 == 1.0
    assert touching.value == 1.0, "no number lies between the two: the lower one parts them"


def test_the_search_takes_a_hundred_thousand_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(100_000, generator=generator) + 2, torch.randn(100_000, generator=generator)
    found = best_threshold(positive, negative)
    # F1 is largest where the chance of being positive is half of F1.
    chance = 1 / (1 + math.exp(2 - 2 * found.value))
    assert chance == pytest.approx(found.f1 / 2, abs=0.02)


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [([], [1.0], "both sides"), ([float("nan")], [1.0], "not finite"), ([1.0], [0.0], "no share")],
)
def test_the_search_refuses(positive: list[float], negative: list[float], message: str) -> None:
    with pytest.raises(FitError, match=message):
        best_threshold(torch.tensor(positive), torch.tensor(negative), max_fpr=None if message != "no share" else 2.0)


def test_rules_are_evaluated_per_row() -> None:
    met = {name: torch.tensor(flags) for name, flags in (("a", [1, 1, 0, 0]), ("b", [1, 0, 1, 0]))}
    met = {name: flags.bool() for name, flags in met.items()}
    cases: list[tuple[Predicate, list[int]]] = [
        (P("a") & P("b"), [1, 0, 0, 0]),
        (P("a") | P("b"), [1, 1, 1, 0]),
        (P("a") & ~P("b"), [0, 1, 0, 0]),
        (~(P("a") | P("b")), [0, 0, 0, 1]),
        ((P("a") & ~P("b")) | (~P("a") & P("b")), [0, 1, 1, 0]),
    ]
    for rule, expected in cases:
        assert rule(met).int().tolist() == expected
        again = Predicate.from_data(json.loads(json.dumps(rule.data)))
        assert again == rule
        assert again(met).int().tolist() == expected
    assert str(P("a") & ~P("b")) == "(a & ~b)"
    assert ((P("a") & P("b")) | P("a")).names == ("a", "b")


def test_a_behaviour_that_two_rules_ask_for_is_applied_once() -> None:
    met = {"a": torch.tensor([True, True, False]), "b": torch.tensor([True, False, False])}
    found = fired([(P("a"), "refuse"), (P("b"), "refuse"), (~P("a"), "greet")], met)
    assert {name: flags.tolist() for name, flags in found.items()} == {
        "refuse": [True, True, False],
        "greet": [False, False, True],
    }


def test_rules_refuse_unknown_names_and_nonsense() -> None:
    with pytest.raises(UnknownNameError, match=r"harmfull.*harmful"):
        P("harmfull")({"harmful": torch.tensor([True])})
    with pytest.raises(TypeError, match="truth value"):
        bool(P("a") and P("b"))
    with pytest.raises(TypeError, match="no predicate"):
        P("a") & "b"  # type: ignore[operator]
    for wrong in (("and", ("name", "a")), ("xor", ("name", "a"), ("name", "b")), "a", (), ("name", 3)):
        with pytest.raises(FitError):
            Predicate.from_data(wrong)


def test_a_rule_over_two_conditions_steers_the_rows_that_meet_it() -> None:
    model = build("llama")
    prompts = [SHORT, LONG, SHORT[:4]]
    one = gated_vector(model, opens=(SHORT, LONG), closes=(SHORT[:4],))
    other = gated_vector(model, read=Site(2), opens=(LONG,), closes=(SHORT, SHORT[:4]))
    expected = {
        P("one") & P("other"): [False, True, False],
        P("one") & ~P("other"): [True, False, False],
        ~P("one") | P("other"): [False, True, True],
    }
    from tests.methods.test_editor import generate

    baseline = generate(model, prompts).logits[0]
    for rule, flags in expected.items():
        vector = combine({"one": one, "other": other}, rule)
        loaded = SteeringVector.from_bytes(vector.to_bytes())
        assert loaded.reads == (Site(3), Site(2))
        with steerkit.steer(model, loaded, 1.0):
            ran = generate(model, prompts).logits[0]
        assert [not torch.equal(ran[row], baseline[row]) for row in range(3)] == flags, str(rule)
        once = combine({"one": one, "other": other}, rule | rule)
        with steerkit.steer(model, once, 1.0):
            assert torch.equal(generate(model, prompts).logits[0], ran), "asked for twice, added once"


def test_combining_refuses_what_does_not_fit() -> None:
    llama, gpt2 = build("llama"), build("gpt2")
    one = gated_vector(llama)
    with pytest.raises(UnknownNameError, match="harmless"):
        combine({"harmful": one}, P("harmless"))
    with pytest.raises(VectorMismatchError, match="one method, model"):
        combine({"a": one, "b": gated_vector(gpt2)}, P("a") | P("b"))
    with pytest.raises(UnknownNameError, match="'c'"):
        combine({"a": one, "b": one}, P("a"), writes="c")
    both = combine({"a": one, "b": one}, P("a") | P("b"))
    with pytest.raises(VectorMismatchError, match="several"):
        combine({"a": both, "b": one}, P("a"))


@pytest.mark.parametrize("condition", ["mean_difference", "pairwise"])
@pytest.mark.parametrize("kind", ["cosine", "cast"])
def test_a_fit_parts_the_two_sides_and_finds_the_planted_layer(condition: str, kind: str) -> None:
    """Activations are planted: only one site parts the sides, and only along one axis."""
    method = ConditionalSteering.from_settings({"condition": condition, "score": kind})
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    from steerkit.activations.recording import Activations
    from steerkit.fitting.subject import ModelSubject
    from steerkit.network.decoder import find_decoder

    generator = torch.Generator().manual_seed(0)
    sites = [Site(layer) for layer in range(1, 4)]
    planted = torch.zeros(32)
    planted[5] = 3.0
    sides = [{site: 0.3 * torch.randn(40, 32, generator=generator) for site in sites} for _ in range(2)]
    sides[0][Site(2)] += planted
    acts = Activations(positive=sides[0], negative=sides[1], paired=True)
    items = ContrastSet.from_prompts(*([f"{kind} {n}" for n in range(40)] for kind in ("Break", "Walk")))
    subject = ModelSubject(model, tokenizer, items, find_decoder(model), 8, None)
    tensors = method.fit(acts, subject, sites)
    assert tensors["shared/layer"].tolist() == [2]
    assert abs(float(tensors["shared/condition"][0, 5])) > 0.9
    scores = [score(side[Site(2)], tensors["shared/condition"][0], kind) for side in sides]  # type: ignore[arg-type]
    threshold, above = float(tensors["shared/threshold"]), bool(tensors["shared/above"])
    assert above
    assert float((scores[0] > threshold).float().mean()) > 0.95
    assert float((scores[1] > threshold).float().mean()) < 0.05
    shared = {f"shared/{name}" for name in ("condition", "layer", "threshold", "above", "fingerprint")}
    assert set(tensors) == {*shared, "resid_post.1/direction"}


def test_the_threshold_is_found_on_scores_of_items_left_out() -> None:
    """On pure noise a direction parts the very items it was fitted on; items left out are not parted."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(30, 200, generator=generator) for _ in range(2)]
    method = ConditionalSteering()
    whole = method._condition(*noise, paired=False)
    own = best_threshold(score(noise[0], whole), score(noise[1], whole))
    each = list(range(30))
    left_out = best_threshold(*method._scores(*noise, whole, folds_of((each, each), 5), paired=False))
    assert own.f1 > 0.95
    assert left_out.f1 < 0.8
    # What stands there three times is left out three times.
    thrice = [side[:12].repeat(3, 1) for side in noise]
    parted, together = (
        best_threshold(*method._scores(*thrice, whole, folds_of((turns, turns), 5), paired=False)).f1
        for turns in (list(range(36)), [row % 12 for row in range(36)])
    )
    assert parted > 0.95
    assert together < 0.8


def test_the_whole_road_from_fit_to_gated_text() -> None:
    model, tokenizer, vector = fitted(writes=[2], direction_from="mean_difference")
    assert vector.sites == (Site(2),)
    assert len(vector.reads) == 1
    assert vector.norms[Site(2)] > 0
    found = steerkit.explain(model, tokenizer, [*HARMFUL, *HARMLESS], vector)
    flags = [row["open"] for row in found]
    assert sum(flags[:5]) > sum(flags[5:]), "items of the fit itself"
    baseline = steerkit.generate(model, tokenizer, [*HARMFUL, *HARMLESS], max_new_tokens=6)
    ran = steerkit.generate(model, tokenizer, [*HARMFUL, *HARMLESS], vector=vector, strength=8.0, max_new_tokens=6)
    assert [one != other for one, other in zip(ran, baseline, strict=True)] == flags


@pytest.mark.parametrize("source", ["response", "mean_difference", "unembed"])
def test_directions_come_from_where_the_setting_says(source: str) -> None:
    _, _, vector = fitted(direction_from=source)
    (site,) = vector.sites
    direction = vector.params(site)["direction"]
    assert float(direction.norm()) > 0
    if source == "unembed":
        assert float(direction.norm()) == pytest.approx(vector.norms[site], rel=1e-5)


def test_strength_counts_in_both_units() -> None:
    model, _, vector = fitted()
    (site,) = vector.sites
    paper = vector.norms[site] / float(vector.params(site)["direction"].norm())
    ids = torch.tensor([SHORT])
    logits = []
    for strength, unit in ((paper, "paper"), (1.0, "norm")):
        with torch.no_grad(), steerkit.steer(model, vector, strength, unit=unit, prompt_lengths=[6]):  # type: ignore[arg-type]
            logits.append(model(ids).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_held_out_items_measure_the_gate() -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    with pytest.warns(UserWarning, match="5 of 5 held-out items have a prompt that is fitted on as well"):
        vector = steerkit.fit(model, tokenizer, data(), method="conditional", held_out=data())
    assert set(vector.held_out["gate"]) == {"tpr", "fpr", "opened"}
    flags = [row["open"] for row in steerkit.explain(model, tokenizer, [*HARMFUL, *HARMLESS], vector)]
    assert vector.held_out["gate"]["tpr"] == pytest.approx(sum(flags[:5]) / 5)
    assert vector.held_out["gate"]["fpr"] == pytest.approx(sum(flags[5:]) / 5)


def test_acceptance_14_round_trip_and_another_model_refused(tmp_path: Path) -> None:
    model, _, vector = fitted()
    loaded = SteeringVector.load(vector.save(tmp_path / "v.safetensors"))
    assert loaded == vector
    logits = []
    for one in (vector, loaded):
        with torch.no_grad(), steerkit.steer(model, one, 1.0, prompt_lengths=[6]):
            logits.append(model(torch.tensor([SHORT])).logits)
    assert torch.equal(logits[0], logits[1])
    with pytest.raises(VectorMismatchError, match="other weights"):
        steerkit.steer(build("llama", seed=1), loaded, 1.0)
    steerkit.steer(build("llama").to(torch.bfloat16), loaded, 1.0)


class _Packed(nn.Linear):
    """A layer that keeps its weight as bitsandbytes does, and computes with other values."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kept.T  # type: ignore[operator]


def _pack(model: Any) -> Any:
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            module.__class__ = _Packed
            object.__setattr__(module, "kept", module.weight.detach().clone())
            packed = torch.randint(256, (module.weight.numel() // 2, 1), dtype=torch.uint8)
            module.weight = nn.Parameter(packed, requires_grad=False)
    return model


def _round_to_four_bits(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                blocks = parameter.view(-1, 32)
                step = blocks.abs().amax(dim=1, keepdim=True) / 7
                blocks.copy_((blocks / step).round() * step)
    return model


def _resized(model: Any) -> Any:
    model.resize_token_embeddings(model.config.vocab_size + 1, mean_resizing=False)
    return model


def _adapted(kind: str, **settings: Any) -> Callable[[Any], Any]:
    def adapt(model: Any) -> Any:
        with warnings.catch_warnings():  # peft 0.21 asks for an attribute that transformers 5 renames
            warnings.simplefilter("ignore", FutureWarning)
            return peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **settings))

    return adapt


SAME: dict[str, Callable[[Any], Any]] = {
    "packed": _pack,
    "rounded to four bits": _round_to_four_bits,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float16": lambda model: model.to(torch.float16),
    "one token more": _resized,
    "lora": _adapted("LoraConfig", target_modules=["q_proj"]),
    "lora with a head of its own": _adapted("LoraConfig", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "ia3": _adapted("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("name", mostly_slow(SAME, list(SAME)[::3]))
def test_a_gate_knows_the_weights_it_was_fitted_on(name: str) -> None:
    _, _, vector = fitted()
    steerkit.steer(SAME[name](build("llama")), vector, 1.0)
    with pytest.raises(VectorMismatchError, match="other weights"):
        steerkit.steer(_moved(build("llama"), 1.0, dims=1 if name == "packed" else 2), vector, 1.0)


def test_a_gate_fitted_on_packed_weights_knows_them_unpacked() -> None:
    model = _moved(_pack(build("llama")), 0.3, dims=1)
    vector = steerkit.fit(model, byte_tokenizer(CHATML), data(), method="conditional")
    steerkit.steer(_moved(build("llama"), 0.3, dims=1), vector, 1.0)
    with pytest.raises(VectorMismatchError, match="other weights"):
        steerkit.steer(_moved(build("llama"), 0.3, dims=1, seed=1), vector, 1.0)


def test_conditions_of_different_weights_are_not_combined() -> None:
    def one(model: Any, **settings: Any) -> SteeringVector:
        return steerkit.fit(model, byte_tokenizer(CHATML), data(), method="conditional", settings=settings)

    mine, rounded = one(build("llama")), one(_round_to_four_bits(build("llama")), direction_from="mean_difference")
    combine({"x": mine, "y": rounded, "z": one(_pack(build("llama")))}, P("x") & P("y") & P("z"))
    with pytest.raises(VectorMismatchError, match="not of one model; fit all of them on the same weights"):
        combine({"x": mine, "y": rounded, "z": one(build("llama", seed=5))}, P("x") & P("y") & P("z"))


def _moved(model: Any, size: float, *, dims: int, seed: int = 0) -> Any:
    """A model whose weights were moved by so many of their standard deviations, or so much of a norm's 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == dims and parameter.is_floating_point():
                step = float(parameter.std()) if dims == 2 else 1.0
                parameter.add_(size * step * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_vlm", "mamba", "qwen3_moe"])
def test_other_weights_are_refused(family: str) -> None:
    known = fingerprint(find_decoder(build(family)))
    assert fits(known, find_decoder(build(family)))
    others = [build(family, seed=1), build(family, seed=7), _moved(build(family), 0.5, dims=2)]
    others.append(_moved(build(family), 0.2, dims=1))
    for other in others:
        assert not fits(known, find_decoder(other))


def test_a_model_trained_further_is_refused() -> None:
    model, known = build("llama"), fingerprint(find_decoder(build("llama")))
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    ids = torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        optimiser.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimiser.step()
    assert not fits(known, find_decoder(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprints_are_what_earlier_files_hold(family: str) -> None:
    """Values of all vectors, then of all matrices, as they stand in a plain model; no random number is drawn."""
    decoder, parts, state = find_decoder(build(family)), [], torch.get_rng_state()
    for dims in (1, 2):
        rows = [entry for name, entry in decoder.model.named_parameters() if entry.dim() == dims and "lora" not in name]
        values = torch.cat([row.detach().flatten()[:: max(1, row.numel() // 8)][:8] for row in spread(rows, 64)])
        parts.append(values / values.abs().max())
    assert torch.equal(fingerprint(decoder), torch.cat(parts))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_fpr": 2.0}, "no share"),
        ({"folds": 1}, "at least 2"),
        ({"score": "cos"}, "allowed are cosine, cast"),
        ({"rule": ["name", "other"]}, "asks about 'other'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        ConditionalSteering.from_settings(settings)


def test_wrong_vectors_and_blocks_are_refused() -> None:
    model = build("llama")
    with pytest.raises(SiteError, match="layer 9 is outside"):
        fitted(writes=[9])
    vector = gated_vector(model)
    short = {name: tensor for name, tensor in vector.tensors.items() if name != "shared/threshold"}
    with pytest.raises(VectorMismatchError, match="lacks a condition"):
        steerkit.steer(model, SteeringVector(**{**_fields(vector), "tensors": short}))
    with pytest.raises(VectorMismatchError, match="reads last or mean"):
        steerkit.steer(model, SteeringVector(**{**_fields(vector), "readout": "response_mean"}))


def test_the_command_explains(answer: Callable[..., Any], cli: Any, here: Path, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    gated_vector(AutoModelForCausalLM.from_pretrained(tiny)).save("gated.safetensors")
    rows = answer("explain", "one", "two words", "--vector", "gated.safetensors", "--model", tiny)
    assert [row["prompt"] for row in rows] == ["one", "two words"]
    assert all(set(row["conditions"]["condition"]) == {"score", "compare", "threshold", "met"} for row in rows)
    shown = cli("explain", "one", "--vector", "gated.safetensors", "--model", tiny)
    assert shown.code == 0
    assert "condition" in shown.out
    refused = cli("explain", "one", "--vector", "v.safetensors", "--model", tiny)
    assert refused.code == 1
    assert "has no gate" in refused.err
