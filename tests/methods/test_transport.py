"""Activation Transport against the published formulas and the published loop, written out slowly."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import steerkit
from steerkit.activations.recording import record
from steerkit.errors import FitError, ScopeError, SiteError, StrengthError, VectorMismatchError
from steerkit.evaluate.controls import refits
from steerkit.evaluate.curve import random_like
from steerkit.export.baking import bake
from steerkit.export.peft import write_adapter
from steerkit.export.range_finder import low_rank
from steerkit.maths import edits
from steerkit.maths.transport import affine_map
from steerkit.methods.transport import Transport
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector
from tests import modes, tolerances
from tests.by_hand import columns_of
from tests.families import BLOCKS, HIDDEN, build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

GOOD = ["what a bright day", "all is well with me, thank you", "yes!", "a fine and happy one", "so glad it is"]
BAD = ["what a dull day", "nothing is well", "no!", "a poor and weary one, alas"]
IDS = torch.tensor([modes.LONG])
model_of = functools.cache(build)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def data(good: int = 5) -> ContrastSet:
    return ContrastSet.from_prompts(GOOD[:good], BAD, raw=True, paired=False)


def fitted(family: str = "llama", *, batch_size: int = 16, sites: Any = None, **settings: Any) -> SteeringVector:
    method = Transport.from_settings(settings)
    common: dict[str, Any] = {"method": method, "sites": sites, "batch_size": batch_size}
    return steerkit.fit(model_of(family), byte_tokenizer(CHATML), data(), **common)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def gap(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


# The maps


def test_one_and_two_the_published_maps() -> None:
    s, t = column(0, 1, 2, 3), column(1, 3, 5, 7)
    found = {kind: affine_map(s, t, kind) for kind in ("linear", "gaussian", "mean")}  # type: ignore[arg-type]
    wanted = {"linear": (2, 1), "gaussian": (2, 1), "mean": (1, 2.5)}
    for kind, (scale, shift) in wanted.items():
        assert float(found[kind].scale) == pytest.approx(scale, abs=1e-12)
        assert float(found[kind].shift) == pytest.approx(shift, abs=1e-12)
    s, t = column(0, 1, 2, 10), column(0, 1, 1, 2)
    found = {kind: affine_map(s, t, kind) for kind in ("linear", "gaussian", "mean")}  # type: ignore[arg-type]
    wanted = {"linear": (0.1593625, 0.4820717), "gaussian": (0.1785287, 0.4197816), "mean": (1.0, -2.25)}
    for kind, (scale, shift) in wanted.items():
        assert float(found[kind].scale) == pytest.approx(scale, abs=5e-8)
        assert float(found[kind].shift) == pytest.approx(shift, abs=5e-8)


def slow_linear(s: Tensor, t: Tensor) -> tuple[float, float]:
    """The least-squares line of the sorted samples, each value of either repeated until both are as many."""
    left = sorted(float(value) for value in s for _ in range(len(t)))
    right = sorted(float(value) for value in t for _ in range(len(s)))
    means = sum(left) / len(left), sum(right) / len(right)
    products = sum((a - means[0]) * (b - means[1]) for a, b in zip(left, right, strict=True))
    scale = products / sum((a - means[0]) ** 2 for a in left)
    return scale, means[1] - scale * means[0]


def test_three_unequal_sizes_are_exact_and_order_is_nothing() -> None:
    found = affine_map(column(0, 1, 2), column(0, 3))
    assert (float(found.scale), float(found.shift)) == (1.5, 0.0)
    s, t = draw(7, 3), 2 * draw(5, 3, seed=1) + 1
    found = affine_map(s, t)
    for place in range(3):
        scale, shift = slow_linear(s[:, place].double(), t[:, place].double())
        assert float(found.scale[place]) == pytest.approx(scale, rel=1e-12)
        assert float(found.shift[place]) == pytest.approx(shift, rel=1e-12)
    again = affine_map(s[torch.randperm(7)], t[torch.randperm(5)])
    torch.testing.assert_close(again.scale, found.scale, rtol=1e-14, atol=0)


def test_four_a_neuron_that_does_not_vary_is_shifted_alone() -> None:
    s, t = torch.cat([column(2, 2, 2), column(0, 1, 2)], dim=1), draw(4, 2)
    for kind in ("linear", "gaussian", "mean"):
        found = affine_map(s, t, kind)  # type: ignore[arg-type]
        assert float(found.scale[0]) == 1.0
        assert float(found.shift[0]) == pytest.approx(float(t[:, 0].double().mean()) - 2, abs=1e-12)
    assert float(affine_map(s[:1], t).scale[1]) == 1.0  # one row has no spread


def test_five_the_support_is_open() -> None:
    h = torch.tensor([-1.0, 0.0, 1.5, 3.0, 4.0])[None, :, None]
    inside = torch.tensor([0.0]), torch.tensor([3.0])
    found = edits.affine(h, torch.tensor([1.0]), torch.tensor([1.0]), inside)
    assert found.flatten().tolist() == [-1.0, 0.0, 4.0, 3.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_edit_is_the_slow_form(dtype: torch.dtype) -> None:
    h, gain, shift = draw(2, 3, 5).to(dtype), draw(2, 1, 5, seed=1), draw(2, 1, 5, seed=2)
    before = h.clone()
    found = edits.affine(h, gain, shift)
    assert found.dtype == dtype
    assert torch.equal(h, before)
    for row in range(2):
        for token in range(3):
            for place in range(5):
                value = float(h[row, token, place])
                wanted = value + float(gain[row, 0, place]) * value + float(shift[row, 0, place])
                rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-7
                assert float(found[row, token, place]) == pytest.approx(wanted, rel=rounding, abs=8 * rounding)


# The fit


def pooled(model: Any, texts: list[str], sites: list[Site], maps: dict[Site, Any]) -> dict[Site, Tensor]:
    """By site [n, d] means over all tokens but the first, each text on its own, as it flows on under maps."""
    found, handles = {site: list[Tensor]() for site in sites}, []
    for site, tap in locate(model, list(maps)).items():
        handles.append(tap.attach(lambda h, one=maps[site]: edits.affine(h, one.scale - 1, one.shift)))
    for site, tap in locate(model, sites).items():
        handles.append(tap.attach(lambda h, rows=found[site]: (rows.append(h[0, 1:].double().mean(0)), h)[1]))
    for text in texts:
        logits(model, torch.tensor([byte_tokenizer(CHATML)(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return {site: torch.stack(rows) for site, rows in found.items()}


def published_loop(model: Any, sites: list[Site], kind: Any = "linear", *, natural: bool = False) -> dict[Site, Any]:
    """Module after module, both subsets under the maps of all earlier ones."""
    maps: dict[Site, Any] = {}
    for site in sites:
        source, target = (pooled(model, texts, [site], maps)[site] for texts in (BAD, GOOD))
        if natural:
            target = pooled(model, GOOD, [site], {})[site]
        maps[site] = affine_map(source, target, kind)
    return maps


SITES = [Site(layer, kind) for layer in range(BLOCKS) for kind in ("attn_in", "mlp_in")]


def test_six_a_sequential_fit_reaches_the_target_everywhere_and_one_at_once_does_not() -> None:
    model: Any = build("llama").double()
    maps = published_loop(model, SITES)
    source, target = (pooled(model, texts, SITES, {}) for texts in (BAD, GOOD))
    at_once = {site: affine_map(source[site], target[site]) for site in SITES}
    reached, missed = (pooled(model, BAD, SITES, one) for one in (maps, at_once))
    vector = fitted()
    for site in SITES:
        assert float((reached[site].mean(0) - maps[site].target).abs().max()) < 1e-10, site
        if site != SITES[0]:
            assert float((missed[site].mean(0) - at_once[site].target).abs().max()) > 1e-2, site
        for name in ("scale", "source", "target"):  # in float32, read and stored
            assert gap(vector.params(site)[name], getattr(maps[site], name)) < 1e-4, (site, name)


@pytest.mark.parametrize(
    "family", ["gemma2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gpt2", "falcon"))]
)
def test_the_fit_is_the_published_loop_in_other_families(family: str) -> None:
    model = model_of(family)
    vector = fitted(family)
    assert len(vector.sites) >= BLOCKS
    for site, one in published_loop(model, list(vector.sites)).items():
        for name in ("scale", "source", "target"):
            assert gap(vector.params(site)[name], getattr(one, name)) < 1e-3, (site, name)


def test_nine_one_pass_is_a_pass_for_each_site_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fitted()
    for batch_size, can_spare in ((1, True), (2, True), (16, False)):
        with monkeypatch.context() as patch:
            if not can_spare:  # every pass then runs from the start, under all maps
                patch.setattr("steerkit.fitting.advancing.can_spare", lambda *_: False)
            again = fitted(batch_size=batch_size)
        for name, tensor in whole.tensors.items():
            assert gap(again.tensors[name], tensor) < 1e-4, (batch_size, name)
    assert not any("forward" in vars(block) for block in find_decoder(model_of("llama")).blocks)


def test_all_sites_take_little_more_than_one_pass() -> None:
    """Beside the unsteered pass: every block once to be done with, and its attention once more."""
    counts = []
    fitted()  # what is found out once in a model's life
    for sequential in (False, True):
        with FlopCounterMode(display=False) as counter:
            fitted(sequential=sequential)
        counts.append(counter.get_total_flops())
    assert 2 < counts[1] / counts[0] < 3, counts


def test_a_target_may_stay_natural() -> None:
    model, vector = model_of("llama"), fitted(target="natural", kind="gaussian")
    for site, one in published_loop(model, SITES, "gaussian", natural=True).items():
        assert gap(vector.params(site)["scale"], one.scale) < 1e-3
        assert gap(vector.params(site)["target"], one.target) < 1e-4
    natural = record(model, byte_tokenizer(CHATML), data(), SITES, readout="mean")
    for site in SITES:
        assert gap(vector.params(site)["target"], natural.positive[site].mean(0)) < 1e-5


@pytest.mark.parametrize("sequential", [True, False])
def test_supports_are_ranges_of_the_source(sequential: bool) -> None:
    model, tokenizer = model_of("llama"), byte_tokenizer(CHATML)
    sites = ["attn_in.1"]
    acts = record(model, tokenizer, data(), sites, readout="mean")
    pooled_one, tokens = (fitted(sites=sites, sequential=sequential, support=one) for one in ("pooled", "tokens"))
    rows = acts.negative[Site(1, "attn_in")]
    params = pooled_one.params(Site(1, "attn_in"))
    assert torch.equal(params["low"], rows.amin(0))
    assert torch.equal(params["high"], rows.amax(0))
    values = []
    tap = locate(model, [Site(1, "attn_in")])[Site(1, "attn_in")]
    handle = tap.attach(lambda h: (values.append(h[0, 1:].clone()), h)[1])
    for text in BAD:
        logits(model, torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    params = tokens.params(Site(1, "attn_in"))
    torch.testing.assert_close(params["low"], torch.cat(values).amin(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(params["high"], torch.cat(values).amax(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sequential", [True, False])
def test_where_the_sides_are_the_same_it_does_not_act(sequential: bool) -> None:
    """Every text ends in the same token: before the first block the last token tells nothing of what came before."""
    model, tokenizer = model_of("llama"), byte_tokenizer(CHATML)
    items = ContrastSet.from_prompts(["so good.", "how fine."], ["so bad.", "how poor."], raw=True)
    how: dict[str, Any] = {"readout": "last", "settings": {"sequential": sequential}, "held_out": items}
    with pytest.warns(UserWarning):  # what it is fitted on is held out too
        vector = steerkit.fit(model, tokenizer, items, method="transport", **how)
    assert vector.sites == tuple(SITES[1:])
    assert set(vector.held_out["sites"]) == set(map(str, SITES[1:]))
    baseline = logits(model)
    with steerkit.steer(model, vector, 1.0):
        assert gap(logits(model), baseline) > 1e-3
    with pytest.raises(FitError, match="the same mean and spread at every site"):
        steerkit.fit(model, tokenizer, items, method="transport", sites=["attn_in.0"], readout="last")


def test_default_sites_are_the_outputs_of_norms() -> None:
    kinds = {
        family: {site.kind for site in Transport().sites(find_decoder(model_of(family)))}
        for family in ("llama", "gemma2", "gpt2", "falcon", "olmo2")
    }
    assert kinds["llama"] == kinds["gpt2"] == {"attn_in", "mlp_in"}
    assert kinds["gemma2"] == kinds["olmo2"] == {"attn_out", "mlp_out"}
    assert kinds["falcon"] == {"block_in"}


def test_shuffled_labels_are_fitted_under_their_own_maps() -> None:
    model, tokenizer = model_of("llama"), byte_tokenizer(CHATML)
    items = ContrastSet.from_prompts(GOOD[:4], BAD, raw=True)
    vector = steerkit.fit(model, tokenizer, items, method="transport", sites=["attn_in.0", "mlp_in.2"])
    found = refits(model, tokenizer, items, vector, shuffled=1, halves=0, resamples=0)
    assert all(value == pytest.approx(1, abs=1e-6) for value in found.reproduced.values())
    assert len(found.reproduced) == 2
    (shuffled,) = found.shuffled
    assert gap(shuffled.tensors["mlp_in.2/target"], vector.tensors["mlp_in.2/target"]) > 1e-3
    # Half of the pairs swapped: of all rows together the mean is what it was, at the first site.
    both = [one.tensors["attn_in.0/source"] + one.tensors["attn_in.0/target"] for one in (shuffled, vector)]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)


# Steering


def by_hand(h: Tensor, params: Any, strength: float, written: Tensor) -> Tensor:
    """(1 - strength) h + strength (w h + b) at some columns, neuron by neuron, inside the support."""
    w = params["scale"].double()
    b = params["target"].double() - w * params["source"].double()
    mapped = (1 - strength) * h.double() + strength * (w * h.double() + b)
    moves = written[:, :, None].expand_as(h)
    if "low" in params:
        moves = moves & (h > params["low"]) & (h < params["high"])
    return torch.where(moves, mapped.to(h.dtype), h)


SCOPES = ("all", "prompt", "response", "generated", "first(4)", "response(1:4)", "generated(2)")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("support", ["none", "tokens"])
def test_a_pass_is_what_hooks_by_hand_do(scope: str, support: str) -> None:
    model, site = model_of("llama"), Site(1, "mlp_in")
    vector = fitted(sites=[site], support=support).at(scope=scope)
    prompt, total = 4, IDS.shape[1]
    columns = torch.arange(total)
    if scope == "response(1:4)":
        written = ((columns >= prompt) & (columns < prompt + 3))[None]
    else:
        written = columns_of(scope, torch.tensor([0]), prompt, total)
    assert bool(written.any())
    tap = locate(model, [site])[site]
    for strength in (0.7, -1.5):
        handle = tap.attach(lambda h, s=strength: by_hand(h, vector.params(site), s, written))
        wanted = logits(model)
        handle.remove()
        with steerkit.steer(model, vector, strength, prompt_lengths=[prompt]):
            assert gap(logits(model), wanted) < tolerances.of_family("llama")
        assert gap(wanted, logits(model)) > 1e-3


CELLS = [(SCOPES[place % len(SCOPES)], mode) for place, mode in enumerate(modes.MODES)]


@pytest.mark.parametrize(("scope", "mode"), [*CELLS, ("all", "per_row"), ("all", "left_padded")])
def test_every_mode_is_one_plain_pass(scope: str, mode: str) -> None:
    model = model_of("llama")
    vector = fitted(sites=["attn_in.1", "mlp_in.2"]).at(scope=scope)
    for one, expected, baseline in modes.run_steered(model, mode, vector, 2.0):
        assert modes.gap(one, expected) < tolerances.of_family("llama")
        assert mode == "beams" or mode == "per_row_beams" or modes.gap(one, baseline) > 1e-4


def test_seven_nothing_at_zero_and_half_the_way_at_a_half() -> None:
    model, site = model_of("llama"), Site(1, "mlp_in")
    vector = fitted(sites=[site])
    tap = locate(model, [site])[site]
    seen = []
    for strength in (0.0, 0.5, 1.0):
        with steerkit.steer(model, vector, strength):
            handle = tap.attach(lambda h: (seen.append(h.clone()), h)[1])
            steered = logits(model)
            handle.remove()
        if strength == 0.0:
            assert torch.equal(steered, logits(model))
    torch.testing.assert_close(seen[1], (seen[0] + seen[2]) / 2, rtol=0, atol=1e-6)
    assert gap(seen[2], seen[0]) > 1e-2


# Weights


@pytest.mark.parametrize(
    ("family", "kinds", "switches"),
    [
        ("llama", ("attn_in", "mlp_in"), {"attention_bias", "mlp_bias"}),
        ("llama", ("z", "attn_out", "mlp_post", "mlp_out", "resid_post"), {"attention_bias", "mlp_bias"}),
        ("gpt2", ("attn_in", "mlp_in", "mlp_post", "mlp_out"), set()),
        ("gemma2", ("attn_raw",), {"attention_bias"}),
    ],
)
def test_eight_what_is_baked_is_what_hooks_do(family: str, kinds: Any, switches: set[str], tmp_path: Path) -> None:
    """All kinds around one layer at once: its rows, its columns and its bias change together."""
    import transformers as tf

    model = model_of(family)
    sites = [Site(layer, kind) for layer in (1, 2) for kind in kinds if kind != "resid_post"]
    vectors = [fitted(family, sites=sites)]
    if "resid_post" in kinds:
        vectors.append(fitted(family, sites=["resid_post.2"], kind="mean"))
    with steerkit.steer(model, vectors, 0.7):
        wanted = logits(model)
    baked = bake(model, None, vectors, tmp_path / "out", strength=0.7)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert gap(logits(again), wanted) < tolerances.of_family(family)
    assert gap(wanted, logits(model)) > 1e-2
    assert set(baked.switches) == switches


def test_shifts_alone_are_an_adapter(tmp_path: Path) -> None:
    """Their weights stay and biases change, which peft can say; a stretch has the rank of the layer's width."""
    vector = fitted(sites=["attn_in.1", "mlp_in.1", "mlp_out.2"], kind="mean")
    adapter = write_adapter(model_of("llama"), None, vector, tmp_path / "mean", strength=0.7)
    assert adapter.verification.holds
    assert adapter.verification.effect > 100 * adapter.verification.relative
    assert len(adapter.modules) == 6
    with pytest.raises(StrengthError, match="rank above 256"):
        low_rank(torch.eye(300) * draw(300), 1.0)


def test_what_has_no_weight_form_says_why() -> None:
    model = model_of("llama")
    with pytest.raises(StrengthError, match="support = 'pooled' has no weight form"):
        edited(model, fitted(sites=["mlp_in.1"], support="pooled"))
    with pytest.raises(ScopeError, match="every token"):
        edited(model, fitted(sites=["mlp_in.1"]).at(scope="response"))
    with pytest.raises(SiteError, match=r"resid_post\.1: an affine map there.*a sum that no one layer gives"):
        edited(model, fitted(sites=["resid_post.1"]))
    with pytest.raises(SiteError, match=r"attn_out\.1.*norms what"):
        edited(model_of("gemma2"), fitted("gemma2", sites=["attn_out.1"]))
    with pytest.raises(SiteError, match=r"mlp_in\.1.*routes tokens"):
        edited(model_of("mixtral"), fitted("mixtral", sites=["mlp_in.1"]))
    with pytest.raises(SiteError, match=r"mlp_out\.1.*routes tokens"):
        edited(model_of("mixtral"), fitted("mixtral", sites=["mlp_out.1"]))


def edited(model: Any, vector: SteeringVector) -> None:
    with steerkit.edited(model, vector, 0.7):
        pass


# What else a method has


def test_the_control_deals_maps_out_anew() -> None:
    vector = fitted(sites=["mlp_in.1"])
    control = random_like(vector, seed=3)
    own, other = vector.params(Site(1, "mlp_in")), control.params(Site(1, "mlp_in"))
    order = [own["scale"].tolist().index(value) for value in other["scale"].tolist()]
    assert sorted(order) == list(range(HIDDEN))
    assert order != list(range(HIDDEN))
    assert torch.equal(other["source"], own["source"][order])
    assert torch.equal(other["target"], own["target"][order])


def test_directions_written_and_read() -> None:
    vector, method = fitted(), Transport()
    natural = record(model_of("llama"), byte_tokenizer(CHATML), data(), SITES, readout="mean")
    for site in SITES:
        params = vector.params(site)
        assert torch.equal(method.direction(params), params["target"] - params["source"])  # type: ignore[arg-type]
        difference = natural.positive[site].mean(0) - natural.negative[site].mean(0)
        torch.testing.assert_close(method.read_direction(params), difference, rtol=1e-5, atol=1e-5)
    with pytest.raises(StrengthError, match="has not"):
        steerkit.steer(model_of("llama"), vector, 1.0, unit="norm")


def test_wrong_settings_and_tensors_are_refused() -> None:
    with pytest.raises(FitError, match="'cubic'"):
        Transport(kind="cubic")  # type: ignore[arg-type]
    for std_eps in (-1.0, float("nan"), True):
        with pytest.raises(FitError, match="std_eps = "):
            Transport(std_eps=std_eps)
    with pytest.raises(FitError, match=r"give \[n, d\] and \[m, d\]"):
        affine_map(torch.ones(2, 3), torch.ones(2, 4))
    vector = fitted(sites=["mlp_in.1"], support="tokens")
    tensors = {name: value for name, value in vector.tensors.items() if not name.endswith("/low")}
    with pytest.raises(VectorMismatchError, match="support = 'tokens' goes with high here"):
        steerkit.steer(model_of("llama"), replace(vector, tensors=tensors))
