"""Steer2Edit where tokens are routed to experts: against loops over tokens and experts, as hooks against weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import steerkit
from steerkit.activations.expert_activations import ExpertMeans
from steerkit.activations.readout import Readout
from steerkit.errors import FitError, SiteError, VectorMismatchError
from steerkit.fitting.fitting import fit
from steerkit.fitting.subject import ModelSubject
from steerkit.maths.rank_one import add_in_order
from steerkit.methods._steer2edit_parts import expert_gates
from steerkit.network.decoder import find_decoder
from steerkit.network.experts import Experts, experts_at
from steerkit.network.linears import writers_at
from steerkit.network.sites import Site
from steerkit.network.tap import anatomies
from steerkit.vector.steering_vector import SteeringVector
from tests import modes, tolerances
from tests.families import GROUPED, QUIET, build
from tests.methods.test_every_method import data_for
from tests.methods.test_steer2edit import ROUTED, SMALL, draw, fitted, slow_edit, state_of
from tests.tiny_tokenizers import CHATML, byte_tokenizer

MLPS = replace(SMALL, rho_attn=0.0)


def mlp_of(model: Any, layer: int) -> Any:
    return model.model.layers[layer].mlp


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def slow_routing(mlp: Any, h: Tensor) -> list[tuple[int, float]]:
    """Which experts one token goes to, and with what weight."""
    router = mlp.router if hasattr(mlp, "router") else mlp.gate
    _, weights, index = router(h[None])
    return list(zip(index[0].tolist(), weights[0].tolist(), strict=True))


def slow_input(mlp: Any, expert: int, h: Tensor) -> Tensor:
    """What the down projection of one expert reads of one token."""
    experts = mlp.experts
    if hasattr(experts, "gate_up_proj_bias"):  # GPT-OSS
        both = h @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    gate, up = (experts.gate_up_proj[expert] @ h).chunk(2)
    return silu(gate) * up


def slow_shared(mlp: Any, h: Tensor) -> Tensor:
    shared = mlp.shared_expert
    return silu(shared.gate_proj.weight @ h) * (shared.up_proj.weight @ h)


def slow_weight(mlp: Any, expert: int) -> Tensor:
    """[o, i] of one expert."""
    stored = mlp.experts.down_proj[expert]
    return stored.T if hasattr(mlp.experts, "gate_up_proj_bias") else stored


def slow_mlp(mlp: Any, h: Tensor, params: Any, strength: float) -> Tensor:
    """One token through an MLP whose matrices are edited one by one."""
    given = torch.zeros_like(h)
    for expert, weight in slow_routing(mlp, h):
        edited = slow_weight(mlp, expert) + strength * torch.outer(params["direction"], params["gate"][expert])
        bias = mlp.experts.down_proj_bias[expert] if hasattr(mlp.experts, "down_proj_bias") else 0.0
        given += weight * (edited @ slow_input(mlp, expert, h) + bias)
    if hasattr(mlp, "shared_expert"):
        edited = mlp.shared_expert.down_proj.weight + strength * torch.outer(params["direction"], params["shared_gate"])
        given += torch.sigmoid(mlp.shared_expert_gate.weight @ h) * (edited @ slow_shared(mlp, h))
    return given


@contextlib.contextmanager
def slowly_edited(model: Any, vector: SteeringVector, strength: float) -> Iterator[None]:
    handles = []
    for site in vector.sites:
        own = vector.params(site)

        def hook(module: Any, args: Any, output: Any, params: Any = own) -> Any:
            read = args[0].reshape(-1, args[0].shape[-1])
            given = torch.stack([slow_mlp(module, h, params, strength) for h in read]).reshape(args[0].shape)
            return (given, *output[1:]) if isinstance(output, tuple) else given

        handles.append(mlp_of(model, site.layer).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def means_of(model: Any, layers: list[int], batch_size: int = 3) -> dict[Site, ExpertMeans]:
    subject = ModelSubject(model, byte_tokenizer(CHATML), data_for(SMALL), find_decoder(model), batch_size, None)
    return subject.experts([Site(layer, "mlp_out") for layer in layers], "response_mean")


def slow_means(model: Any, layer: int) -> tuple[Any, Any, Any, Any]:
    """Sums of x / T and of 1 / T by (side, expert), the shared expert's by side, and the MLP's outputs by side."""
    data, mlp = data_for(SMALL), mlp_of(model, layer)
    subject = ModelSubject(model, byte_tokenizer(CHATML), data, find_decoder(model), 1, None)
    seen: dict[str, Tensor] = {}

    def keep(_module: Any, args: Any, output: Any) -> None:
        seen["read"], seen["gave"] = args[0][0], (output[0] if isinstance(output, tuple) else output)[0]

    sums: dict[Any, Any] = {}
    counts: dict[Any, float] = {}
    shared: dict[int, Any] = {0: 0.0, 1: 0.0}
    gave: dict[int, list[Tensor]] = {0: [], 1: []}
    handle = mlp.register_forward_hook(keep)
    for side, items in enumerate((data.positive, data.negative)):
        for text in subject.rendered(items):
            model(torch.tensor([text.ids]))
            tokens = Readout.parse("response_mean").tokens(text)
            gave[side].append(seen["gave"][list(tokens)].mean(dim=0))
            for token in tokens:
                h = seen["read"][token]
                for expert, _ in slow_routing(mlp, h):
                    key = side, expert
                    sums[key] = sums.get(key, 0.0) + slow_input(mlp, expert, h) / len(tokens)
                    counts[key] = counts.get(key, 0.0) + 1 / len(tokens)
                if hasattr(mlp, "shared_expert"):
                    shared[side] = shared[side] + slow_shared(mlp, h) / len(tokens) / len(items)
    handle.remove()
    return sums, counts, shared, {side: torch.stack(rows).mean(dim=0) for side, rows in gave.items()}


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    assert tolerances.gap(one, other) <= tolerance


@pytest.mark.parametrize("family", ROUTED)
def test_means_and_edits_in_their_slow_form(family: str) -> None:
    """Token by token and expert by expert: what is read, the mean over an expert's own tokens, the paper's steps."""
    model, vector = fitted(family, MLPS)
    layer = vector.sites[-1].layer
    params = vector.params(vector.sites[-1])
    (means,) = means_of(model, [layer]).values()
    mlp, texts = mlp_of(model, layer), len(data_for(SMALL).positive)
    with torch.no_grad():
        sums, counts, shared, gave = slow_means(model, layer)
        v = gave[0] - gave[1]
        close(params["direction"], v / v.norm())
        for expert in range(4):
            both = []
            for side in (0, 1):
                mean = sums[side, expert] / counts[side, expert]
                close(means.inputs[side, expert], mean)
                assert abs(float(means.tokens[side, expert]) - counts[side, expert] / texts) < 1e-5
                both.append(mean)
            weight = slow_weight(mlp, expert)
            edited, magnitudes = slow_edit(weight.double(), v.double(), (both[0] + both[1]).double() / 2, 0.5, 0.2, 1)
            torch.testing.assert_close(params["magnitude"][expert], magnitudes.float(), atol=1e-4, rtol=0)
            found = weight + torch.outer(params["direction"], params["gate"][expert])
            torch.testing.assert_close(found, edited.float(), atol=1e-4, rtol=0)
        assert (means.shared is not None) == ("shared_gate" in params) == hasattr(mlp, "shared_expert")
        if means.shared is not None:
            close(means.shared[0], shared[0])
            close(means.shared[1], shared[1])
            weight = mlp.shared_expert.down_proj.weight
            edited, _ = slow_edit(weight.double(), v.double(), (shared[0] + shared[1]).double() / 2, 0.5, 0.2, 1)
            found = weight + torch.outer(params["direction"], params["shared_gate"])
            torch.testing.assert_close(found, edited.float(), atol=1e-4, rtol=0)
    assert bool((params["magnitude"] > 0).any()) and bool((params["magnitude"] < 0).any())


@pytest.mark.parametrize("family", ROUTED)
def test_hooks_and_weights_are_a_loop_over_tokens_and_experts(family: str) -> None:
    model, vector = fitted(family, MLPS)
    baseline = modes.plain_logits(model, modes.SHORT)
    for strength in (1.0, -0.7):
        with torch.no_grad(), slowly_edited(model, vector, strength):
            expected = modes.plain_logits(model, modes.SHORT)
        with steerkit.steer(model, vector, strength):
            hooked = modes.plain_logits(model, modes.SHORT)
        with steerkit.edited(model, vector, strength):
            folded = modes.plain_logits(model, modes.SHORT)
        close(hooked, expected, tolerances.of_family(family))
        close(folded, expected, tolerances.of_family(family))
        assert float((expected - baseline).abs().max() / baseline.abs().max()) > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss"])
def test_every_way_of_computing_experts_gives_the_same(family: str, implementation: str) -> None:
    model, vector = build(family), fitted(family)[1]
    model.set_experts_implementation(implementation)
    with steerkit.steer(model, vector):
        hooked = modes.plain_logits(model, modes.SHORT)
    with steerkit.edited(model, vector):
        close(modes.plain_logits(model, modes.SHORT), hooked, tolerances.of_family(family))
    again = fit(model, byte_tokenizer(CHATML), data_for(SMALL), method=SMALL)
    for name, tensor in vector.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ROUTED)
def test_the_stack_is_written_exactly_and_put_back_bitwise(family: str) -> None:
    model, vector = fitted(family)
    before = state_of(model)
    site = next(site for site in vector.sites if site.kind == "mlp_out")
    params, name = vector.params(site), f"model.layers.{site.layer}.mlp.experts.down_proj"
    change = 0.5 * params["direction"][:, None] * params["gate"][:, None, :]
    with steerkit.edited(model, vector, 0.5):
        now = model.state_dict()[name]
        torch.testing.assert_close(now, before[name] + (change.mT if family == "gpt_oss" else change))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_file_holds_a_row_for_every_expert() -> None:
    model, vector = fitted("qwen3_next")
    loaded = SteeringVector.from_bytes(vector.to_bytes())
    assert {name: tensor.shape for name, tensor in loaded.params(Site(0, "mlp_out")).items()} == {
        "direction": (32,),
        "gate": (4, 24),
        "magnitude": (4, 24),
        "tokens": (2, 4),
        "shared_gate": (24,),
        "shared_magnitude": (24,),
    }
    assert {name.partition("mlp.")[2] for name in loaded.extra["weights"] if "mlp" in name} == {
        "experts.down_proj",
        "shared_expert.down_proj.weight",
    }
    with steerkit.steer(model, vector):
        steered = modes.plain_logits(model, modes.SHORT)
    with steerkit.steer(model, loaded):
        assert torch.equal(modes.plain_logits(model, modes.SHORT), steered)
    other = build("qwen3_next")
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj[2, 3, 5] += 1
    with pytest.raises(VectorMismatchError, match=r"mlp\.experts\.down_proj differs"):
        loaded.check(other)


# Experts without tokens


def test_an_expert_to_which_nothing_is_routed_is_left_alone() -> None:
    model = build("gpt_oss")
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.router.bias[2] = -1e4
    vector = fit(model, byte_tokenizer(CHATML), data_for(SMALL), method=MLPS)
    before = state_of(model)
    for site in vector.sites:
        params = vector.params(site)
        assert torch.equal((params["tokens"] == 0).any(dim=0), torch.tensor([False, False, True, False]))
        assert not bool(params["gate"][2].any()) and bool(params["gate"][[0, 1, 3]].any(dim=1).all())
    with steerkit.edited(model, vector):
        for site in vector.sites:
            name = f"model.layers.{site.layer}.mlp.experts.down_proj"
            same = (model.state_dict()[name] == before[name]).flatten(1).all(dim=1)
            assert same.tolist() == [False, False, True, False]
    listing = MLPS.table(vector)
    assert listing.note.endswith(f"{len(vector.sites)} experts left alone: no token of one side was routed there")
    assert "of 3 experts" in str(listing.rows[0][2])
    with steerkit.steer(model, vector):
        assert bool(torch.isfinite(modes.plain_logits(model, modes.LONG)).all())


def many_experts() -> Any:
    experts = {"num_experts": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tf.Qwen3MoeConfig(**GROUPED, **QUIET, **experts, head_dim=8)
        return tf.Qwen3MoeForCausalLM(config).eval()


def test_an_expert_with_tokens_on_one_side_only_is_left_alone() -> None:
    """And more neurons than the stream is wide, so that what is read comes in two pieces."""
    model = many_experts()
    vector = fit(model, byte_tokenizer(CHATML), data_for(SMALL), method=MLPS)
    alone = 0
    for site in vector.sites:
        params = vector.params(site)
        taken = params["tokens"] > 0
        alone += int((taken[0] != taken[1]).sum())
        assert not bool(params["magnitude"][~taken.all(dim=0)].any())
        assert bool(params["magnitude"][taken.all(dim=0)].any(dim=1).any())
        torch.testing.assert_close(params["tokens"].sum(dim=1), torch.full((2,), 2.0))
    assert alone > 0, "the case is not what it says"
    with torch.no_grad():
        sums, counts, _, _ = slow_means(model, 1)
    (means,) = means_of(model, [1]).values()
    for (side, expert), count in counts.items():
        close(means.inputs[side, expert], sums[side, expert] / count)
    assert int((means.tokens > 0).sum()) == len(counts)
    with steerkit.steer(model, vector):
        hooked = modes.plain_logits(model, modes.LONG)
    with steerkit.edited(model, vector):
        close(modes.plain_logits(model, modes.LONG), hooked, tolerances.tolerance(model, torch.tensor([modes.LONG])))


def test_means_do_not_depend_on_the_batches() -> None:
    model, _ = fitted("mixtral")
    (one,), (other,) = (list(means_of(model, [2], size).values()) for size in (1, 16))
    close(one.inputs, other.inputs)
    close(one.tokens, other.tokens)


# Precision


def test_bfloat16_rounds_as_the_released_code_does_for_every_expert() -> None:
    model = build("qwen3_next").to(torch.bfloat16)
    method = replace(MLPS, precision="bfloat16")
    vector = fit(model, byte_tokenizer(CHATML), data_for(method), method=method)
    before = state_of(model)
    for site, writer in writers_at(model, vector.sites).items():
        params = vector.params(site)
        assert isinstance(writer, Experts)
        with steerkit.edited(model, vector):
            now = state_of(model)
        for expert in range(4):
            magnitude = params["magnitude"][expert]
            inputs = (params["gate"][expert].sign() * magnitude.sign())[:, None]
            old = before[writer.parameters[0]][expert]
            expected = add_in_order(old, params["direction"], inputs, magnitude)
            assert torch.equal(now[writer.parameters[0]][expert], expected)
        inputs = (params["shared_gate"].sign() * params["shared_magnitude"].sign())[:, None]
        expected = add_in_order(before[writer.parameters[1]], params["direction"], inputs, params["shared_magnitude"])
        assert torch.equal(now[writer.parameters[1]], expected)
    with steerkit.steer(model, vector):
        hooked = modes.plain_logits(model, modes.SHORT).float()
    with steerkit.edited(model, vector):
        folded = modes.plain_logits(model, modes.SHORT).float()
    assert float((hooked - folded).abs().max() / folded.abs().max()) < 0.1


# What is refused


def test_experts_alone_need_no_partner_and_others_do() -> None:
    model, _ = fitted("mixtral")
    tokenizer, data = byte_tokenizer(CHATML), data_for(SMALL)
    vector = fit(model, tokenizer, data, method=SMALL, sites=["mlp_raw.1"])
    assert vector.sites == (Site(1, "mlp_out"),)
    with pytest.raises(SiteError, match="experts"):
        fit(model, tokenizer, data, method=SMALL, sites=["mlp_post.1", "mlp_raw.1"])
    with pytest.raises(FitError, match=r"needs z\.1"):
        fit(model, tokenizer, data, method=SMALL, sites=["mlp_raw.1", "attn_out.1"])
    with pytest.raises(FitError, match=r"needs mlp_post\.1"):
        fit(build("llama"), tokenizer, data, method=SMALL, sites=["mlp_out.1"])


class Listed(nn.Module):
    """Experts one by one, as models had them once."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 24), nn.SiLU(), nn.Linear(24, 32)) for _ in range(2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return sum((expert(hidden_states) for expert in self.experts), torch.zeros_like(hidden_states))


def normed(model: Any) -> None:
    """Something that is not linear behind each expert."""
    for layer in model.model.layers:
        layer.mlp.experts.has_post_expert_norm = True
        layer.mlp.experts.post_expert_norm = nn.RMSNorm(32)


def listed(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp = Listed()


@pytest.mark.parametrize(("change", "match"), [(normed, "0 stacks"), (listed, "0 stacks .* 2 linear layers")])
def test_other_makes_of_experts_are_refused_and_heads_still_edited(change: Any, match: str) -> None:
    model = build("mixtral")
    change(model)
    vector = fit(model, byte_tokenizer(CHATML), data_for(SMALL), method=SMALL)
    assert {site.kind for site in vector.sites} == {"attn_out"}
    for where in ({"method": MLPS}, {"method": SMALL, "sites": ["mlp_out.1"]}):
        with pytest.raises(SiteError, match=f"cannot be told apart: {match}") as error:
            fit(model, byte_tokenizer(CHATML), data_for(SMALL), **where)
        assert "\n" not in str(error.value)


def test_experts_that_are_given_every_token_are_refused() -> None:
    """Llama 4 runs all tokens through all experts, most of them times zero."""
    config = tf.Llama4TextConfig(
        **GROUPED, **QUIET, num_local_experts=4, intermediate_size_mlp=48, interleave_moe_layer_step=1, head_dim=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.Llama4ForCausalLM(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    decoder = find_decoder(model)
    with pytest.raises(SiteError, match="not told, token by token"):
        experts_at(decoder, anatomies(decoder, {1})[1], Site(1, "mlp_out"))


def test_experts_under_accelerate() -> None:
    """Its hooks run a module through its own `forward`; offloaded weights cannot be looked at."""
    from accelerate import cpu_offload, dispatch_model

    _, vector = fitted("qwen3_next")
    model: Any = dispatch_model(build("qwen3_next"), {"": "cpu"}, force_hooks=True)
    assert hasattr(mlp_of(model, 1).experts, "_hf_hook"), "the case is not what it says"
    with steerkit.steer(model, vector):
        hooked = modes.plain_logits(model, modes.SHORT)
    with steerkit.edited(model, vector):
        close(modes.plain_logits(model, modes.SHORT), hooked, tolerances.of_family("qwen3_next"))
    offloaded = build("mixtral")
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with pytest.raises(SiteError, match="a copy of them does not run") as error:
        fit(offloaded, byte_tokenizer(CHATML), data_for(SMALL), method=MLPS)
    assert "\n" not in str(error.value)


def test_a_shared_expert_that_is_all_but_silent_is_found() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = build("qwen3_next").to(dtype)
        for layer in model.model.layers:
            with torch.no_grad():
                layer.mlp.shared_expert.up_proj.weight *= 1e-3
        (writer,) = writers_at(model, [Site(1, "mlp_out")]).values()
        assert isinstance(writer, Experts) and writer.shared is not None


def test_a_vector_of_other_matrices_is_refused() -> None:
    model, vector = fitted("mixtral", MLPS)
    site = vector.sites[0]
    params = vector.params(site)
    MLPS.check(site, params)
    for change in ({"gate": draw(4, 5)}, {"magnitude": draw(48)}, {"shared_gate": draw(24)}):
        with pytest.raises(VectorMismatchError, match="gate"):
            MLPS.check(site, {**params, **change})
    with pytest.raises(SiteError, match="no gates of experts"):
        expert_gates(fitted("llama")[1].params(Site(1, "mlp_out")))
    more = {**vector.tensors, f"{site}/shared_gate": draw(24), f"{site}/shared_magnitude": draw(24)}
    with pytest.raises(SiteError, match="1 matrices write there and the vector edits 2"):
        MLPS.weight_updates(model, replace(vector, tensors=more), 1.0)


def test_nothing_stays_behind() -> None:
    """No hook, no module and no parameter but the model's own, after fitting and after steering."""
    model = build("qwen3_next")
    names = [name for name, _ in model.named_parameters()]
    vector = fit(model, byte_tokenizer(CHATML), data_for(SMALL), method=SMALL)
    with steerkit.steer(model, vector):
        modes.plain_logits(model, modes.SHORT)
    assert [name for name, _ in model.named_parameters()] == names
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert sum(hooks) == sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in build("qwen3_next").modules()
    )


def test_hooks_of_others_see_one_run_of_the_experts() -> None:
    """The second run, which finds what the gates say, is nobody's business."""
    model, vector = fitted("mixtral")
    calls: list[int] = []
    with steerkit.steer(model, vector):
        handles = [
            module.register_forward_hook(lambda *_: calls.append(1))
            for module in (mlp_of(model, 1).experts, mlp_of(model, 1).gate)
        ]
        modes.plain_logits(model, modes.SHORT)
        for handle in handles:
            handle.remove()
    assert len(calls) == 2


def test_the_table_tells_experts_from_the_shared_one() -> None:
    _, vector = fitted("qwen3_next", MLPS)
    listing = MLPS.table(vector)
    told = {str(row[2]).partition(" of ")[2] for row in listing.rows}
    assert "the shared expert" in told and any(text.endswith("experts") for text in told)
    total = sum(int(str(row[2]).split()[0]) for row in listing.rows)
    assert listing.title == f"{total} neurons edited"
    (neurons,) = MLPS.maps(vector)
    assert sum(map(len, neurons.rows.values())) == total
