"""Directional ablation against slow, obvious forms: at one site, at chosen sites, at every write, and as weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steerkit
from steerkit.errors import FitError, ScopeError, SiteError, StrengthError, VectorMismatchError
from steerkit.evaluate.controls import refits
from steerkit.evaluate.scorers.projection import Projection
from steerkit.evaluate.setup import Setup
from steerkit.maths import edits
from steerkit.methods.ablation import DirectionalAblation
from steerkit.methods.angular import AngularSteering
from steerkit.network import expert_matrices
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.network.writers import every_write
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.vector.steering_vector import SteeringVector
from tests import modes, rotations, tolerances
from tests.choices import mostly_slow
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

PAIRS = [
    ("a bright and cheerful morning", "a dull and gloomy morning"),
    ("what a happy little town", "what a weary little town"),
    ("they danced with joy all day", "they wept in grief all day"),
    ("sunny and warm by the sea", "bitter and cold by the sea"),
]
IDS = torch.tensor([modes.LONG])
EVERY = ("llama", "gemma2", "gpt2", "gpt_neox", "mamba", "mixtral", "bloom", "qwen3_next")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data() -> ContrastSet:
    return ContrastSet.from_prompts([good for good, _ in PAIRS], [bad for _, bad in PAIRS], raw=True)


def vector_for(model: nn.Module, *, direction: Tensor | None = None, **settings: Any) -> SteeringVector:
    """A vector with a random direction, as if fitted at block 1."""
    decoder = find_decoder(model)
    method = DirectionalAblation(**settings)
    tensors = {"shared/direction": 3 * draw(decoder.hidden_size) if direction is None else direction}
    written = method.written([Site(1)], tensors, decoder)
    return SteeringVector(
        method="ablation",
        tensors=tensors,
        sites=tuple(written),
        fitted_at=None if written == [Site(1)] else (Site(1),),
        edit="project_out",
        scope="all",
        unit="paper",
        settings=method.settings,
        model_type=decoder.model.config.get_text_config().model_type,
        hidden_size=decoder.hidden_size,
        num_layers=decoder.num_layers,
    )


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def slow_removal(h: Tensor, direction: Tensor, share: float = 1.0) -> Tensor:
    """Token by token and component by component, in float64."""
    u = direction.double() / direction.double().square().sum().sqrt()
    rows = []
    for token in h.reshape(-1, h.shape[-1]).double():
        along = sum(float(a) * float(b) for a, b in zip(token, u, strict=True))
        rows.append(torch.stack([value - share * along * part for value, part in zip(token, u, strict=True)]))
    return torch.stack(rows).reshape(h.shape)


@contextlib.contextmanager
def seen_at(model: nn.Module, sites: list[Site]) -> Iterator[dict[Site, Tensor]]:
    """What flows on at some sites, after every edit."""
    found: dict[Site, Tensor] = {}
    handles = []
    for site, tap in locate(model, sites).items():

        def read(_module: Any, args: Any, kwargs: Any, *, site: Site = site, tap: Any = tap) -> None:
            found[site] = tap.read(args, kwargs).clone()

        def gave(_module: Any, args: Any, kwargs: Any, output: Any, *, site: Site = site, tap: Any = tap) -> None:
            found[site] = tap.read(args, kwargs, output).clone()

        if tap.side == "input":
            handles.append(tap.module.register_forward_pre_hook(read, with_kwargs=True))
        else:
            handles.append(tap.module.register_forward_hook(gave, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


# the operator


@pytest.mark.parametrize("share", [1.0, 0.0, 0.4, 2.0, -1.0])
def test_project_out_is_the_slow_form(share: float) -> None:
    h, direction = draw(2, 3, 16), 5 * draw(16, seed=1)
    torch.testing.assert_close(
        edits.project_out(h, direction, share=share).double(), slow_removal(h, direction, share), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", rotations.DTYPES)
def test_project_out_is_the_reference_s(kind: str) -> None:
    """Relative to what was given, since little may be left. In bfloat16 the reference rounds the direction too."""
    group = "cal.bf16" if kind == "bf16" else "cal.f32"
    h = rotations.arrays()["rot.h"].to(rotations.DTYPES[kind])
    got = edits.project_out(h, rotations.arrays()[f"{group}.b1"])
    off = (got.double() - rotations.arrays()[f"rot.{kind}.ablation"].double()).abs().amax(dim=-1)
    limit = rotations.TOLERANCE["rotation_bf16" if kind == "bf16" else "rotation_f32_f64"]
    assert float((off / h.double().abs().amax(dim=-1).clamp_min(1e-12)).max()) < limit


def test_project_out_is_the_first_paper_s() -> None:
    h = rotations.arrays()["rot.h"]
    got = edits.project_out(h, rotations.arrays()["ref.direction"])
    off = (got - rotations.arrays()["ref.ablation"]).abs().amax(dim=-1) / h.abs().amax(dim=-1).clamp_min(1e-12)
    assert float(off.max()) < rotations.TOLERANCE["rotation_f32_f64"]


def test_logits_and_tokens_of_the_golden_model() -> None:
    """The plane's first axis taken out of every norm's output."""
    places = tuple(rotations.sides("tiny").positive)
    method = DirectionalAblation(writes=tuple(map(str, places)))
    vector, _ = rotations.tiny_vector(AngularSteering())
    vector = replace(
        vector,
        method=method.name,
        edit=method.edit_name,
        settings=method.settings,
        tensors={"shared/direction": vector.tensors["shared/direction"]},
    )
    for test in ("test0", "test1"):
        ids = rotations.facts()["tiny_prompts"][test]
        with steerkit.steer(rotations.tiny(), vector, 1.0):
            logits, tokens = rotations.tiny_logits(ids), rotations.tiny_tokens(ids)
        expected = rotations.arrays()[f"tiny.logits.ablation.{test}"]
        assert float(rotations.gap(logits.flatten(), expected[0].flatten())) < rotations.TOLERANCE["tiny_logits"]
        assert tokens == rotations.arrays()[f"tiny.greedy.ablation.{test}"][0].tolist()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_direction_of_any_length_is_taken_out(size: float) -> None:
    h, u = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(edits.project_out(h, u * size), edits.project_out(h, u), rtol=0, atol=1e-6)
    torch.testing.assert_close(edits.set_projection(h, u * size, 2.0), edits.set_projection(h, u, 2.0))


def test_project_out_leaves_nothing_along_and_all_across() -> None:
    """At the width of a 7B model, with a direction of any length and activations that mostly lie along it."""
    direction = 37.0 * draw(3584, seed=1)
    u = direction.double() / direction.double().norm()
    h = (draw(4, 5, 3584).double() + 200 * u).float()
    before = h.clone()
    after = edits.project_out(h, direction)
    assert torch.equal(h, before)
    along = (after.double() @ u).abs() / (h.double() @ u).abs()
    assert float(along.max()) < 1e-5
    assert float((h.double() @ u).abs().min()) > 190
    across = after.double() - (h.double() - (h.double() @ u)[..., None] * u)
    assert float(across.abs().max()) < 1e-4


def test_project_out_computes_in_float32_whatever_the_dtype() -> None:
    direction = draw(3584, seed=1)
    h = (draw(4, 5, 3584) + 3 * direction / direction.norm()).bfloat16()
    after = edits.project_out(h, direction)
    assert after.dtype == torch.bfloat16
    u = direction.double() / direction.double().norm()
    exact = h.double() - (h.double() @ u)[..., None] * u
    # No more than the one rounding at the end; a coordinate rounded to bfloat16 would be seen everywhere.
    assert bool(((after.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all())
    assert edits.project_out(h.half(), direction).dtype == torch.float16
    assert edits.project_out(h.double(), direction).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(edits.project_out(h, direction), after)


def test_project_out_of_a_direction_without_length_takes_nothing() -> None:
    h = draw(1, 2, 8).requires_grad_()
    assert torch.equal(edits.project_out(h, torch.zeros(8)), h)
    edits.project_out(h, draw(8, seed=1)).sum().backward()
    assert h.grad is not None
    assert bool(torch.isfinite(h.grad).all())


# the method


def test_one_site_loses_its_own_direction() -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    added = steerkit.fit(model, tokenizer, data(), method="caa", layers=[0, 2])
    vector = steerkit.fit(model, tokenizer, data(), method="ablation", layers=[0, 2])
    assert vector.sites == vector.reads == (Site(0), Site(2))
    assert vector.fitted_at is None
    decoder = find_decoder(model)
    for site in vector.sites:
        assert torch.equal(vector.params(site)["direction"], added.params(site)["direction"])

    def by_hand(layer: int, share: float) -> Callable[..., Any]:
        direction = vector.params(Site(layer))["direction"]
        return lambda _module, _args, output: slow_removal(output, direction, share).float()

    for share in (1.0, 0.3, -0.5, 2.0):
        handles = [decoder.blocks[layer].register_forward_hook(by_hand(layer, share)) for layer in (0, 2)]
        expected = logits(model)
        for handle in handles:
            handle.remove()
        with steerkit.steer(model, vector, share):
            assert gap(logits(model), expected) < 1e-5
        assert gap(expected, logits(model)) > 1e-3


def test_rows_have_their_own_share_and_zero_is_the_identity() -> None:
    model = build("llama")
    vector = vector_for(model, writes="every")
    ids = torch.tensor([modes.LONG, modes.LONG, modes.LONG])
    baseline = logits(model, ids)
    with steerkit.steer(model, vector, 0.0):
        assert torch.equal(logits(model, ids), baseline)
    with steerkit.steer(model, vector, [0.0, 1.0, 0.5]) as steering:
        mixed = logits(model, ids)
        steering.strength = [1.0, 0.0, 0.5]
        swapped = logits(model, ids)
    assert torch.equal(mixed[0], baseline[0])
    assert torch.equal(swapped[1], baseline[1])
    for row, share in ((1, 1.0), (2, 0.5)):
        with steerkit.steer(model, vector, share):
            assert gap(mixed[row], logits(model)[0]) < 1e-5
    assert gap(swapped[0], mixed[1]) < 1e-5


def test_bfloat16_leaves_what_rounding_leaves() -> None:
    model = build("llama").bfloat16()
    vector = vector_for(model, writes="every")
    u = vector.tensors["shared/direction"] / vector.tensors["shared/direction"].norm()
    last = Site(3)
    with seen_at(model, [last]) as baseline:
        logits(model)
    with steerkit.steer(model, vector, 1.0), seen_at(model, [last]) as found:
        logits(model)
    assert found[last].dtype == torch.bfloat16
    assert float((found[last].float() @ u).abs().max()) < 0.01 * float((baseline[last].float() @ u).abs().max())


@pytest.mark.parametrize("family", EVERY)
def test_every_write_is_free_of_the_direction(family: str) -> None:
    model = build(family)
    decoder = find_decoder(model)
    vector = vector_for(model, writes="every")
    kinds = {site.kind for site in vector.sites}
    halves = {"mamba": {"mixer_out"}, "qwen3_next": {"mixer_out", "attn_out", "mlp_out"}}
    assert kinds == {"resid_pre", *halves.get(family, {"attn_out", "mlp_out"})}
    u = vector.tensors["shared/direction"] / vector.tensors["shared/direction"].norm()
    watched = [*vector.sites, *(Site(layer) for layer in range(decoder.num_layers))]
    with seen_at(model, watched) as baseline:
        before = logits(model)
    with steerkit.steer(model, vector, 1.0), seen_at(model, watched) as found:
        after = logits(model)
    assert gap(after, before) > 1e-2
    assert set(found) == set(watched)
    for site, h in found.items():
        assert float(((h @ u).abs() / h.norm(dim=-1)).max()) < 1e-5, site
    assert all(float(((h @ u).abs() / h.norm(dim=-1)).max()) > 1e-2 for h in baseline.values())


def test_every_write_in_the_middle_of_a_block_by_hand() -> None:
    """Llama's forward pass written out, the direction taken out behind each sum."""
    model: Any = build("llama")
    vector = vector_for(model, writes="every")
    direction = vector.tensors["shared/direction"]
    body = model.model
    with torch.no_grad():
        h = slow_removal(body.embed_tokens(IDS), direction).float()
        positions = torch.arange(IDS.shape[1])[None]
        rope = body.rotary_emb(h, positions)
        width = IDS.shape[1]
        mask = torch.full((width, width), float("-inf")).triu(1)[None, None]
        for block in body.layers:
            wrote = block.self_attn(block.input_layernorm(h), position_embeddings=rope, attention_mask=mask)[0]
            h = slow_removal(h + wrote, direction).float()
            h = slow_removal(h + block.mlp(block.post_attention_layernorm(h)), direction).float()
        expected = model.lm_head(body.norm(h))
    with steerkit.steer(model, vector, 1.0):
        assert gap(logits(model), expected) < 1e-5


def test_norms_on_the_stream_itself_are_refused() -> None:
    with pytest.raises(SiteError, match="norms the residual stream itself"):
        every_write(find_decoder(build("opt_post")))
    model, tokenizer = build("opt_post"), byte_tokenizer(CHATML)
    vector = steerkit.fit(
        model, tokenizer, data(), method="ablation", layers=[1], settings={"writes": ["resid_pre.1", "attn_out.3"]}
    )
    assert vector.sites == (Site(1, "resid_pre"), Site(3, "attn_out"))


def test_bug_25_one_site_leaves_a_projection_at_the_last_block_and_every_write_none() -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    calm = [Conversation("Two and two?", answer="4"), Conversation("Why?", answer="Because it is so.")]
    setup = Setup(model, tokenizer, data=ContrastSet.from_answers([("So?", "Good.", "Bad.")] * 2), neutral=calm)
    one = steerkit.fit(model, tokenizer, data(), method="ablation", layers=[1])
    every = steerkit.fit(model, tokenizer, data(), method="ablation", layers=[1], settings={"writes": "every"})
    assert torch.equal(one.params(Site(1))["direction"], every.tensors["shared/direction"])
    last, here = Projection.along(one), Projection.along(one, "resid_post.1")
    baseline = float(last.score(setup.baseline)["projection"].abs().max())
    left = float(last.score(setup.trial(one, 1.0))["projection"].abs().max())
    assert float(here.score(setup.trial(one, 1.0))["projection"].abs().max()) < 1e-5
    assert left > 0.01, "one layer does not remove it: later blocks write it anew"
    assert baseline > 0.01
    assert float(last.score(setup.trial(every, 1.0))["projection"].abs().max()) < 1e-5
    assert Projection.along(every).direction == last.direction


# fitted at one place, written at others


@pytest.mark.filterwarnings("ignore:4 of 4 held-out items")
def test_a_direction_fitted_at_one_site_is_written_at_others() -> None:
    model, tokenizer = build("gpt2"), byte_tokenizer(CHATML)
    settings = {"writes": ["resid_pre.2", "attn_raw.3"]}
    vector = steerkit.fit(
        model, tokenizer, data(), method="ablation", layers=[1], settings=settings, held_out=data(), batch_size=2
    )
    assert vector.sites == (Site(2, "resid_pre"), Site(3, "attn_out"))
    assert vector.reads == vector.fitted_at == (Site(1),)
    assert list(vector.tensors) == ["shared/direction"]
    assert set(vector.held_out["sites"]) == {"resid_post.1"}
    assert set(vector.norms) == {Site(1)}
    loaded = SteeringVector.from_bytes(vector.to_bytes())
    assert loaded == vector
    assert loaded.reads == (Site(1),)
    assert loaded.describe()["fitted_at"] == ["resid_post.1"]
    with steerkit.steer(model, loaded, 1.0) as steering:
        assert steering.sites == vector.sites
        assert gap(logits(model), logits(build("gpt2"))) > 1e-4


def test_refits_read_where_it_was_fitted() -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    more = ContrastSet.from_prompts([good for good, _ in PAIRS] * 2, [bad for _, bad in PAIRS] * 2, raw=True)
    vector = steerkit.fit(model, tokenizer, more, method="ablation", layers=[1], settings={"writes": "every"})
    found = refits(model, tokenizer, more, vector, shuffled=2, halves=2, resamples=2)
    assert set(found.reproduced) == {Site(1)}
    assert found.reproduced[Site(1)] == pytest.approx(1.0, abs=1e-6)
    assert all(other.sites == vector.sites for other in found.shuffled)


@pytest.mark.parametrize("writes", ["fitted", "every"])
def test_the_control_is_a_random_direction_of_the_same_length(writes: str) -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    vector = steerkit.fit(model, tokenizer, data(), method="ablation", layers=[1], settings={"writes": writes})
    control = DirectionalAblation(writes=writes).control(vector, torch.Generator().manual_seed(3))
    assert control.sites == vector.sites
    (name,) = vector.tensors
    own, other = vector.tensors[name], control.tensors[name]
    assert float(other.norm()) == pytest.approx(float(own.norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(own, other, dim=0))) < 0.6
    with steerkit.steer(model, control, 1.0):
        assert gap(logits(model), logits(build("llama"))) > 1e-4


@pytest.mark.parametrize("rows", mostly_slow([False, True], [True]))
def test_compiled_whole_and_not_again_for_another_strength(rows: bool) -> None:
    torch._dynamo.reset()
    model: Any = build("llama")
    calls: list[int] = []

    def backend(graph: Any, _inputs: Any, **_options: Any) -> Any:
        calls.append(1)
        return graph.forward

    vector = vector_for(model, writes="every")
    ids = torch.tensor([modes.LONG, modes.LONG])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    values: list[Any] = [[1.0, 0.5], [0.0, 1.0]] if rows else [1.0, 0.5, 0.0]
    with torch.no_grad(), steerkit.steer(model, vector, values[0]) as steering:
        compiled(ids)
        before = len(calls)
        for value in values:
            steering.strength = value
            got = compiled(ids).logits
            with torch.compiler.set_stance("force_eager"):
                assert gap(got, model(ids).logits) < 1e-5
    assert len(calls) == before
    torch._dynamo.reset()


# refusals


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"writes": "everywhere"}, FitError, "'everywhere'"),
        ({"writes": ()}, FitError, "a list of names"),
        ({"writes": 5}, FitError, "writes 5"),
        ({"writes": ("resid_pre.1", 5)}, FitError, "a list of names"),
        ({"writes": ("resid_pre.1", "resid_pre.1")}, FitError, "twice"),
        ({"writes": ("resid.1",)}, SiteError, "unknown kind"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        DirectionalAblation(**settings)


@pytest.mark.parametrize(
    ("sites", "match"),
    [(["resid_post.0", "resid_post.1"], "one direction, got resid_post.0, resid_post.1"), (["mlp_post.1"], "width 48")],
)
def test_one_direction_of_the_streams_width_is_wanted_for_every_write(sites: list[str], match: str) -> None:
    with pytest.raises(FitError, match=match):
        steerkit.fit(
            build("llama"),
            byte_tokenizer(CHATML),
            data(),
            method="ablation",
            sites=sites,
            settings={"writes": "every"},
        )


def test_a_written_site_of_another_width_is_refused() -> None:
    with pytest.raises(SiteError, match=r"mlp_post\.1 is 48 wide, the direction 32"):
        steerkit.fit(
            build("llama"),
            byte_tokenizer(CHATML),
            data(),
            method="ablation",
            sites=["resid_post.1"],
            settings={"writes": ("resid_post.1", "mlp_post.1")},
        )


def test_a_direction_without_length_is_refused_when_attached() -> None:
    model = build("llama")
    vector = vector_for(model, direction=torch.zeros(32))
    with pytest.raises(VectorMismatchError, match=r"resid_post\.1: the direction has length 0"):
        steerkit.steer(model, vector)


def test_there_is_no_length_to_count_in_norms() -> None:
    model = build("llama")
    with pytest.raises(StrengthError, match="has not"):
        steerkit.steer(model, vector_for(model), 1.0, unit="norm")


# weights


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gpt_neox", "phi3", "mistral", "mixtral", "qwen3_moe", "gpt_oss", "qwen3_next"]
)
def test_weights_equal_hooks_and_come_back(family: str) -> None:
    model = build(family)
    vector = vector_for(model, writes="every")
    before, baseline = state_of(model), logits(model)
    with steerkit.steer(model, vector, 1.0):
        hooked = logits(model)
    with steerkit.edited(model, vector, 1.0):
        folded = logits(model)
    assert gap(folded, hooked) < tolerances.of_family(family)
    assert gap(folded, baseline) > 1e-2
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(logits(model), baseline)


def test_the_orthogonalised_weights_are_the_papers() -> None:
    model: Any = build("gpt_neox")
    vector = vector_for(model, writes="every")
    u = vector.tensors["shared/direction"].double()
    remover = torch.eye(32, dtype=torch.double) - torch.outer(u, u) / u.square().sum()
    block = model.gpt_neox.layers[2]
    before = state_of(model)
    with steerkit.edited(model, vector, 1.0):
        inside = state_of(model)
        for name, module in (
            ("attention.dense", block.attention.dense),
            ("mlp.dense_4h_to_h", block.mlp.dense_4h_to_h),
        ):
            for leaf in ("weight", "bias"):
                full = f"gpt_neox.layers.2.{name}.{leaf}"
                expected = remover @ before[full].double()
                torch.testing.assert_close(getattr(module, leaf).double(), expected, rtol=1e-5, atol=1e-6)
    embedded = before["gpt_neox.embed_in.weight"].double() @ remover.T
    torch.testing.assert_close(inside["gpt_neox.embed_in.weight"].double(), embedded, rtol=1e-5, atol=1e-6)
    changed = {name for name, value in inside.items() if not torch.equal(value, before[name])}
    written = {f"attention.dense.{leaf}" for leaf in ("weight", "bias")}
    written |= {f"mlp.dense_4h_to_h.{leaf}" for leaf in ("weight", "bias")}
    blocks = {f"gpt_neox.layers.{layer}.{name}" for layer in range(4) for name in written}
    assert changed == {"gpt_neox.embed_in.weight", *blocks}


@pytest.mark.parametrize("family", ["gpt2", "opt", "cohere", "falcon", "mamba"])
def test_tied_models_are_refused_or_untied(family: str) -> None:
    model: Any = build(family)
    refused = vector_for(model, writes="every")
    with pytest.raises(SiteError, match=r"tied weights.*untie=True"), steerkit.edited(model, refused):
        pass
    vector = vector_for(model, writes="every", untie=True)
    before, baseline = state_of(model), logits(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    kept = head.weight.clone()
    assert head.weight is embedding.weight
    with steerkit.steer(model, vector, 1.0):
        hooked = logits(model)
    with steerkit.edited(model, vector, 1.0):
        assert torch.equal(head.weight, kept)
        assert head.weight is not embedding.weight
        folded = logits(model)
    assert gap(folded, hooked) < 1e-5
    assert head.weight is embedding.weight
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(logits(model), baseline)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "post_attention_layernorm` norms what"),
        ("olmo2", "post_attention_layernorm` norms what"),
        ("gemma3_vlm", "writes images, too"),
        ("bloom", "a norm or projection comes between"),
        ("llama_peft", "merge it first"),
    ],
)
def test_families_without_an_exact_weight_form_are_refused(family: str, reason: str) -> None:
    model = build(family)
    vector = vector_for(model, writes="every", untie=True)
    before = state_of(model)
    with pytest.raises(SiteError, match=reason), steerkit.edited(model, vector):
        pass
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_experts_are_not_taken_by_their_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices with other names, and one that is overlooked: taking a direction out of the rest does not silence it."""
    model: Any = build("qwen3_next")
    vector = vector_for(model, writes="every")
    with monkeypatch.context() as patch:
        patch.setattr(expert_matrices, "_DOWN", ("gate_up_proj",))
        with pytest.raises(SiteError, match="usually named down_proj"), steerkit.edited(model, vector):
            pass
    real = expert_matrices.linear_matrices
    with monkeypatch.context() as patch:
        patch.setattr(
            expert_matrices,
            "linear_matrices",
            lambda decoder, name, *more: [] if "shared" in name else real(decoder, name, *more),
        )
        with pytest.raises(SiteError, match="usually named down_proj"), steerkit.edited(model, vector):
            pass


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_half_precision_weights_are_edited_as_far_as_they_can_be_written(family: str) -> None:
    model = build(family).bfloat16()
    vector = vector_for(model, writes="every")
    u = vector.tensors["shared/direction"] / vector.tensors["shared/direction"].norm()
    last = Site(3)
    with seen_at(model, [last]) as baseline:
        logits(model)
    with steerkit.edited(model, vector, 1.0), seen_at(model, [last]) as found:
        logits(model)
    assert float((found[last].float() @ u).abs().max()) < 0.02 * float((baseline[last].float() @ u).abs().max())


@pytest.mark.parametrize(
    ("settings", "change", "error", "match"),
    [
        ({"writes": "fitted"}, {}, SiteError, "write at every write"),
        ({"writes": "every"}, {"strength": 0.5}, StrengthError, "strength 0.5"),
        ({"writes": "every"}, {"scope": "response"}, ScopeError, "scope='all'"),
    ],
)
def test_what_weights_cannot_do_is_refused(
    settings: dict[str, Any], change: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = build("llama")
    vector = vector_for(model, **settings).at(**change)
    with pytest.raises(error, match=match), steerkit.edited(model, vector):
        pass


def test_a_vector_of_other_sites_than_its_settings_say_is_refused_as_weights() -> None:
    model = build("llama")
    vector = vector_for(model, writes="every")
    some = replace(vector, sites=vector.sites[:3])
    with pytest.raises(SiteError, match="every write"), steerkit.edited(model, some):
        pass


# Weights of some writes only


SETS = {
    "llama": (["attn_out.0", "mlp_out.2"], ["attn_out.0", "attn_out.1", "attn_out.2", "attn_out.3"]),
    "gpt2": (["attn_out.1", "mlp_out.1"],),
    "gpt_neox": (["mlp_out.0", "mlp_out.3"],),
    "gemma2": (["attn_raw.1", "mlp_raw.2"],),
    "mixtral": (["attn_out.0", "mlp_out.1"],),
    "qwen3_next": (["mixer_out.0", "mlp_out.1"],),
    "mamba": (["mixer_out.1"],),
}


@pytest.mark.parametrize("share", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(("family", "writes"), [(family, sites) for family, sets in SETS.items() for sites in sets])
def test_weights_of_chosen_writes_equal_hooks_for_any_share(family: str, writes: list[str], share: float) -> None:
    model: Any = build(family)
    vector = vector_for(model, writes=tuple(writes))
    before, baseline = state_of(model), logits(model)
    with steerkit.steer(model, vector, share):
        hooked = logits(model)
    with steerkit.edited(model, vector, share):
        folded, inside = logits(model), state_of(model)
    assert gap(folded, hooked) < tolerances.of_family(family)
    assert gap(folded, baseline) > 1e-4
    changed = {name for name, value in inside.items() if not torch.equal(value, before[name])}
    assert changed and not any("embed" in name or "wte" in name for name in changed)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_each_site_s_own_direction_goes_into_its_own_matrix() -> None:
    model: Any = build("llama")
    sites = (Site(0, "attn_out"), Site(2, "mlp_out"))
    tensors = {f"{site}/direction": draw(32, seed=seed) for seed, site in enumerate(sites)}
    vector = replace(
        vector_for(model, writes="fitted", direction=draw(32)), tensors=tensors, sites=sites, fitted_at=None
    )
    with steerkit.steer(model, vector, 0.7):
        hooked = logits(model)
    with steerkit.edited(model, vector, 0.7):
        assert gap(logits(model), hooked) < 1e-5


def test_sites_that_no_linear_layer_writes_are_refused_as_weights() -> None:
    for family, site, reason in (
        ("gemma2", "attn_out.1", "norm"),
        ("llama", "resid_pre.2", "resid_pre"),
        ("llama_peft", "attn_out.1", "merge it first"),
    ):
        model = build(family)
        vector = vector_for(model, writes=(site,))
        expected = pytest.raises(SiteError, match=rf"no exact weight form here .*{reason}.*outputs of linear layers")
        with expected, steerkit.edited(model, vector):
            pass
