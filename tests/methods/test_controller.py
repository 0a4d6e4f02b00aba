"""Weighted controllers: what is trained and what is not, schedules, dead zone, clip, and one file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.errors import FitError, ScopeError, VectorMismatchError
from steerkit.fitting.training import minimise
from steerkit.maths.probes import auc, fpr_at_tpr
from steerkit.methods import Schedule
from steerkit.methods import _controller_gate as network
from steerkit.methods.controller import WeightedController, permuted_weights
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.report.card import vector_card
from steerkit.steering import replay as passes
from steerkit.vector.steering_vector import SteeringVector
from tests import modes
from tests.families import BLOCKS, build
from tests.gated import activation
from tests.methods.test_conditional import HARMFUL, HARMLESS, _fields
from tests.methods.test_editor import generate
from tests.modes import LONG, SHORT
from tests.tiny_tokenizers import CHATML, byte_tokenizer

STRENGTH = 0.5
SHARED = "shared/"


@functools.cache
def model_of(family: str) -> Any:
    return build(family)


def data() -> ContrastSet:
    return ContrastSet.from_prompts(HARMFUL, HARMLESS)


@functools.cache
def fitted(family: str = "llama", **settings: Any) -> SteeringVector:
    model, tokenizer = model_of(family), byte_tokenizer(CHATML)
    readout = settings.pop("readout", None)
    return steerkit.fit(model, tokenizer, data(), method="controller", readout=readout, settings=settings)


def set_gain(vector: SteeringVector, gain: float | None = None, **settings: Any) -> SteeringVector:
    """The vector with a probe that gives every row one gain, or SHORT a large and LONG a small one."""
    model = model_of(vector.model_type)
    tensors = dict(vector.tensors)
    if gain is None:
        rows = [torch.cat([activation(model, prompt, site) for site in vector.reads]) for prompt in (SHORT, LONG)]
        rows = [(row - tensors["shared/mean"]) / tensors["shared/spread"] for row in rows]
        along = rows[0] - rows[1]
        along = along / along.dot(along) * 8
        tensors["shared/probe_weight"] = along
        tensors["shared/probe_bias"] = -(along.dot(rows[0] + rows[1]) / 2)[None] - 0.5
    else:
        tensors["shared/probe_weight"] = torch.zeros_like(tensors["shared/probe_weight"])
        tensors["shared/probe_bias"] = torch.logit(torch.tensor([gain]))
    changed = {**dict(vector.settings), "gate": "probe", **settings}
    method = WeightedController.from_settings(changed)
    fields = _fields(vector) | {"tensors": tensors, "settings": changed, "scope": method.default_scope}
    return SteeringVector(**fields)


def by_hand(model: Any, vector: SteeringVector, ids: list[int], start: int, steps: dict[Site, float]) -> Tensor:
    """[t, v] logits of one plain pass in which every block's output is moved from column `start` on."""
    handles = []
    for site, step in steps.items():
        shift = step * vector.params(site)["direction"]

        def moved(_module: Any, _args: Any, output: Any, shift: Tensor = shift) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            h = torch.cat([h[:, :start], h[:, start:] + shift], dim=1)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        blocks = model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.get_decoder().h
        handles.append(blocks[site.layer].register_forward_hook(moved))
    found = modes.plain_logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def slow_gain(vector: SteeringVector, h: dict[Site, Tensor]) -> tuple[float, list[float]]:
    """The network written out for one prompt, number by number."""
    net = {name.removeprefix(SHARED): tensor for name, tensor in vector.tensors.items()}
    x = (torch.cat([h[site] for site in vector.reads]).double() - net["mean"]) / net["spread"]
    inner = [
        max(0.0, float(row.double() @ x + bias))
        for row, bias in zip(net["first_weight"], net["first_bias"], strict=True)
    ]
    z = sum(a * float(b) for a, b in zip(inner, net["gain_weight"], strict=True)) + float(net["gain_bias"])
    weights = [
        sum(a * float(b) for a, b in zip(inner, row, strict=True)) + float(bias)
        for row, bias in zip(net["block_weight"], net["block_bias"], strict=True)
    ]
    return 1 / (1 + 2.718281828459045**-z), [1 / (1 + 2.718281828459045**-w) for w in weights]


def test_acceptance_01_the_weight_head_gets_no_gradient_from_the_gain_and_one_when_learned() -> None:
    net = network.begun(12, 8, 4, seed=0)
    leaves = {name: tensor.requires_grad_() for name, tensor in net.items()}
    x, labels = torch.randn(6, 12), torch.tensor([1.0, 1, 1, 0, 0, 0])
    torch.nn.functional.binary_cross_entropy_with_logits(network.gain_logits(net, x), labels).backward()
    assert leaves["shared/gain_weight"].grad is not None
    for name in network.WEIGHTS:
        assert leaves[name].grad is None or not leaves[name].grad.any()
    random, learned = fitted(weights="random", seed=3), fitted(weights="learned", seed=3, learn_items=4)
    for name in (*network.GAIN, *network.PROBE):
        assert torch.equal(random.tensors[name], learned.tensors[name])
    begun = network.begun(len(random.tensors["shared/mean"]), 64, BLOCKS, seed=3)
    for name in network.WEIGHTS:
        assert torch.equal(random.tensors[name], begun[name]), "the paper's weights are what they began as"
        assert not torch.equal(learned.tensors[name], begun[name])


def test_learning_weights_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    model.lm_head.weight.requires_grad_(False)
    before = {name: (entry.detach().clone(), entry.requires_grad) for name, entry in model.named_parameters()}
    settings = {"weights": "learned", "learn_items": 2}
    steerkit.fit(model, byte_tokenizer(CHATML), data(), method="controller", settings=settings)
    for name, entry in model.named_parameters():
        assert torch.equal(entry, before[name][0])
        assert entry.requires_grad == before[name][1]
        assert entry.grad is None
    assert not any(block._forward_hooks for block in model.model.layers)


def test_learning_lowers_the_loss_of_refusals() -> None:
    """Weights learned where writing helps are larger than at the start, on the prompts they were learned on."""
    model, tokenizer = model_of("llama"), byte_tokenizer(CHATML)
    random = fitted(weights="random", gate="mlp", reach=0.3)
    learned = fitted(weights="learned", gate="mlp", reach=0.3, learn_items=5, rate=1e-2)
    losses = []
    for vector in (random, learned):
        from dataclasses import replace

        from steerkit.fitting.subject import ModelSubject
        from steerkit.methods._refusal import REFUSING
        from steerkit.network.decoder import find_decoder
        from steerkit.prompts.conversation import Conversation

        subject = ModelSubject(model, tokenizer, data(), find_decoder(model), 8, None)
        items = [replace(Conversation(text), answer=REFUSING[row]) for row, text in enumerate(HARMFUL)]
        rows = steerkit.explain(model, tokenizer, HARMFUL, vector, strength=0.3)
        shifts = {
            site: torch.tensor([row["blocks"][str(site)] for row in rows])[:, None] * vector.params(site)["direction"]
            for site in vector.sites
        }
        with torch.no_grad():
            logits, ids, predicts = subject.shifted(items, shifts)
        likely = torch.log_softmax(logits, dim=-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        first = predicts & (predicts.cumsum(dim=1) <= 4)  # the words with which a refusal begins
        losses.append(-float((likely * first[:, :-1]).sum() / first.sum()))
    assert losses[1] < losses[0]


def test_the_network_is_the_slow_form() -> None:
    vector, model = fitted(weights="random"), model_of("llama")
    found = steerkit.explain(model, byte_tokenizer(CHATML), [HARMFUL[0]], vector)
    from steerkit.activations.recording import record

    read = record(model, byte_tokenizer(CHATML), [HARMFUL[0]], vector.reads)
    gain, weights = slow_gain(vector, {site: read[site][0] for site in vector.reads})
    assert found[0]["gain"] == pytest.approx(gain, abs=1e-5)
    assert list(found[0]["weights"].values()) == pytest.approx(weights, abs=1e-5)
    assert set(found[0]["scores"]) == {"mlp", "probe"}
    assert found[0]["scores"]["mlp"] == found[0]["gain"]
    assert found[0]["scores"]["probe"] != found[0]["gain"]


def test_features_are_standardised_and_the_sides_are_told_apart() -> None:
    vector, model = fitted(), model_of("llama")
    from steerkit.activations.recording import record

    read = record(model, byte_tokenizer(CHATML), [*HARMFUL, *HARMLESS], vector.reads)
    rows = torch.cat([read[site] for site in vector.reads], dim=-1)
    assert torch.allclose(vector.tensors["shared/mean"], rows.mean(0), atol=1e-5)
    assert torch.allclose(vector.tensors["shared/spread"], rows.std(0, correction=0).clamp_min(1e-6), atol=1e-5)
    for gate in ("mlp", "probe"):
        method = WeightedController.from_settings({**vector.settings, "gate": gate})
        scores = method.editor(vector).gain({site: read[site] for site in vector.reads})  # type: ignore[attr-defined]
        assert auc(scores[:5], scores[5:]) > 0.8


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("weights", ["uniform", "random", "fixed"])
def test_acceptance_07_every_block_is_changed_as_much_as_the_formula_says(family: str, weights: str) -> None:
    fixed = (1.0, 0.0, 3.0, 4.0) if weights == "fixed" else ()
    model, vector = model_of(family), set_gain(fitted(family, weights=weights, fixed=fixed))
    (row,) = _explained(model, vector, SHORT)
    assert row["open"]
    assert len(row["blocks"]) == BLOCKS
    if weights == "uniform":
        assert set(row["weights"].values()) == {1.0}
    if weights == "fixed":
        assert list(row["weights"].values()) == pytest.approx([0.5, 0.0, 1.5, 2.0])
    for site, step in row["blocks"].items():
        assert step == pytest.approx(STRENGTH * row["gain"] * row["weights"][site], abs=1e-6)
        norm = float(vector.params(Site.parse(site))["direction"].norm())
        assert norm == pytest.approx(vector.norms[Site.parse(site)], rel=1e-4)
    with steerkit.steer(model, vector, STRENGTH):
        ran = generate(model, [SHORT, LONG])
    answer = ran.sequences[0, len(LONG) :].tolist()
    steps = {Site.parse(name): step for name, step in row["blocks"].items()}
    expected = by_hand(model, vector, [*SHORT, *answer], len(SHORT) - 1, steps)
    assert gap(torch.stack(ran.logits)[:, 0], expected[len(SHORT) - 1 : -1]) < 1e-5
    baseline = generate(model, [SHORT, LONG])
    assert torch.equal(torch.stack(ran.logits)[:, 1], torch.stack(baseline.logits)[:, 1]), "the closed row, bitwise"
    for left_out in steps:
        if steps[left_out]:
            fewer = by_hand(model, vector, [*SHORT, *answer], len(SHORT) - 1, {**steps, left_out: 0.0})
            assert gap(fewer, expected) > 1e-4, f"{left_out} changes nothing"


def _explained(model: Any, vector: SteeringVector, prompt: tuple[int, ...], strength: float = STRENGTH) -> Any:
    from steerkit.methods._registry import method_of

    editor = method_of(vector).editor(vector)
    assert editor is not None
    return editor.explain({site: activation(model, prompt, site)[None] for site in vector.reads}, strength)


STARTS = {"replay": len(SHORT) - 1, "paper": len(SHORT), "two_pass": 0}


@pytest.mark.parametrize("schedule", STARTS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_schedules_begin_where_they_say(schedule: str, use_cache: bool) -> None:
    model, vector = model_of("llama"), set_gain(fitted(), schedule=schedule)
    with steerkit.steer(model, vector, STRENGTH):
        ran = generate(model, [SHORT], use_cache=use_cache)
    (row,) = _explained(model, vector, SHORT)
    answer = ran.sequences[0, len(SHORT) :].tolist()
    steps = {Site.parse(name): step for name, step in row["blocks"].items()}
    expected = by_hand(model, vector, [*SHORT, *answer], STARTS[schedule], steps)
    assert gap(torch.stack(ran.logits)[:, 0], expected[len(SHORT) - 1 : -1]) < 1e-5
    baseline = generate(model, [SHORT])
    assert torch.equal(ran.logits[0], baseline.logits[0]) == (schedule == "paper")


def test_online_follows_each_token() -> None:
    """The gain found behind a token acts on the next one: position j is moved by what was read at position j - 1."""
    model, vector = model_of("llama"), set_gain(fitted(), schedule="online", dead_zone=0.0)
    with steerkit.steer(model, vector, STRENGTH):
        ran = generate(model, [SHORT, LONG])
        answer = ran.sequences[0, len(LONG) :].tolist()
        with pytest.raises(ScopeError, match="one a pass"):
            generate(model, [SHORT], use_cache=False)
        with pytest.raises(ScopeError, match="num_beams=1"):
            generate(model, [SHORT], num_beams=3)
    (row,) = _explained(model, vector, SHORT)
    gains = [row["gain"]]
    ids = [*SHORT]
    found = []
    for number in range(len(answer)):
        logits, gain = _online_pass(model, vector, ids, len(SHORT) - 1, gains)
        found.append(logits)
        gains.append(gain)
        ids.append(answer[number])
        if number == 0:
            gains[1:] = gains[:1]  # what the prompt's end decided acts on its own position and on the next
    assert gap(torch.stack(ran.logits)[:, 0], torch.stack(found)) < 1e-5
    assert max(gains) - min(gains) > 1e-3, "the gains differ, or nothing is tested"


@pytest.mark.parametrize("opens_later", [False, True])
def test_online_feeds_nothing_again_where_the_prompt_opens_no_gate(
    opens_later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, vector = model_of("llama"), set_gain(fitted(), schedule="online", gain=0.01)
    decide, again = network.ControllerGate.decide, passes._Replayer._again
    calls: list[str] = []

    def decided(self: Any, found: Any) -> Any:
        decision = decide(self, found)
        calls.append("decide")
        behind = opens_later and len(calls) > 1
        return replace(decision, is_open=torch.full_like(decision.is_open, behind))

    monkeypatch.setattr(network.ControllerGate, "decide", decided)
    monkeypatch.setattr(passes._Replayer, "_again", lambda *args: (calls.append("again"), again(*args))[1])
    baseline = generate(model, [SHORT, LONG])
    with steerkit.steer(model, vector, 100 * STRENGTH):
        ran = generate(model, [SHORT, LONG])
    assert calls == ["decide"] * len(baseline.logits)
    same = [torch.equal(one, other) for one, other in zip(ran.logits, baseline.logits, strict=True)]
    # What is decided behind the first token that is generated acts on the second one.
    assert same == ([True, True, False, False, False] if opens_later else [True] * 5)


def _online_pass(
    model: Any, vector: SteeringVector, ids: list[int], start: int, gains: list[float]
) -> tuple[Tensor, float]:
    """Logits [v] behind the last token, and the gain that is read there before it is written."""
    features: dict[Site, Tensor] = {}
    handles = []
    for place_of_block in map(Site, range(BLOCKS)):

        def moved(_module: Any, _args: Any, h: Tensor, site: Site = place_of_block) -> Tensor:
            features[site] = h[0, -1].clone()
            h = h.clone()
            for place in range(start, h.shape[1]):
                h[0, place] += STRENGTH * gains[place - start] * vector.params(site)["direction"]
            return h

        handles.append(model.model.layers[place_of_block.layer].register_forward_hook(moved))
    logits = modes.plain_logits(model, ids)[-1]
    for handle in handles:
        handle.remove()
    net = vector.tensors
    x = (torch.cat([features[site] for site in vector.reads]) - net["shared/mean"]) / net["shared/spread"]
    return logits, float(torch.sigmoid(x @ net["shared/probe_weight"] + net["shared/probe_bias"]))


def test_the_dead_zone_is_bitwise_the_base_model() -> None:
    model, ids = model_of("llama"), [SHORT, LONG]
    baseline = generate(model, ids)
    for gain, opens in ((0.049, False), (0.051, True)):
        with steerkit.steer(model, set_gain(fitted(), gain), STRENGTH):
            ran = generate(model, ids)
        same = all(torch.equal(one, other) for one, other in zip(ran.logits, baseline.logits, strict=True))
        assert same != opens
        assert (not opens) == torch.equal(ran.past_key_values.layers[3].keys, baseline.past_key_values.layers[3].keys)


def test_the_gain_is_clipped() -> None:
    model, vector = model_of("llama"), set_gain(fitted(), 0.9, limit=0.3)
    assert list(_explained(model, vector, SHORT, 5.0)[0]["blocks"].values()) == pytest.approx([0.3] * BLOCKS)
    logits = []
    for strength in (5.0, 0.3 / 0.9, -5.0):
        with steerkit.steer(model, vector, strength):
            logits.append(generate(model, [SHORT]).logits[0])
    assert gap(logits[0], logits[1]) < 1e-5
    assert gap(logits[0], logits[2]) > 1e-3


@pytest.mark.filterwarnings("ignore:.*is fitted on as well")
def test_held_out_figures_name_the_better_gate() -> None:
    vector = steerkit.fit(
        model_of("llama"), byte_tokenizer(CHATML), data(), method="controller", settings={"epochs": 2}, held_out=data()
    )
    gate = vector.held_out["gate"]
    assert set(gate) == {"mlp", "probe", "better", "tpr", "fpr", "opened"}
    for name in ("mlp", "probe"):
        assert 0 <= gate[name]["auroc"] <= 1
        assert 0 <= gate[name]["fpr_at_95_tpr"] <= 1
    ranks = {name: (gate[name]["auroc"], -gate[name]["fpr_at_95_tpr"]) for name in ("mlp", "probe")}
    assert gate["better"] == ("neither" if ranks["mlp"] == ranks["probe"] else max(ranks, key=lambda name: ranks[name]))


def test_figures_by_hand() -> None:
    positive, negative = torch.tensor([0.9, 0.8, 0.3, 0.5]), torch.tensor([0.1, 0.5, 0.4])
    assert auc(positive, negative) == pytest.approx((3 + 3 + 1 + 2.5) / 12)
    assert fpr_at_tpr(positive, negative, 0.75) == pytest.approx(1 / 3)
    assert fpr_at_tpr(positive, negative, 1.0) == pytest.approx(2 / 3)


def test_weights_dealt_out_anew_are_the_same_weights_elsewhere() -> None:
    model, vector = model_of("llama"), set_gain(fitted(weights="random"))
    dealt = permuted_weights(vector, seed=1)
    before, after = (list(_explained(model, one, SHORT)[0]["weights"].values()) for one in (vector, dealt))
    assert before != after
    assert sorted(before) == pytest.approx(sorted(after))
    with pytest.raises(FitError, match="cannot be permuted"):
        permuted_weights(fitted())


@pytest.mark.parametrize("blocks", [2, 3, 5])
def test_every_weight_is_dealt_to_another_block(blocks: int) -> None:
    fields, found = _fields(fitted(weights="random")), set()
    weights = torch.arange(blocks).float()

    def with_weights(values: Tensor) -> SteeringVector:
        changed = {"shared/block_weight": values[:, None], "shared/block_bias": values}
        return SteeringVector(**fields | {"tensors": {**fields["tensors"], **changed}})

    for seed in range(8):
        dealt = permuted_weights(with_weights(weights), seed)
        order = dealt.tensors["shared/block_bias"]
        assert (order != weights).all(), "every block's weight belongs to another block"
        assert order.sort().values.tolist() == weights.tolist()
        assert torch.equal(dealt.tensors["shared/block_weight"][:, 0], order)
        found.add(tuple(order.tolist()))
    assert (len(found) > 1) == (blocks > 2)
    with pytest.raises(FitError, match="one block"):
        permuted_weights(with_weights(weights[:1]))


def test_acceptance_14_round_trip_and_another_model_refused(tmp_path: Path) -> None:
    model, vector = model_of("llama"), set_gain(fitted())
    loaded = SteeringVector.load(vector.save(tmp_path / "v.safetensors"))
    assert loaded == vector
    ran = []
    for one in (vector, loaded):
        with steerkit.steer(model, one, STRENGTH):
            ran.append(generate(model, [SHORT, LONG]).logits)
    assert all(torch.equal(one, other) for one, other in zip(*ran, strict=True))
    with pytest.raises(VectorMismatchError, match="other weights"):
        steerkit.steer(build("llama", seed=5), loaded, 1.0)
    with pytest.raises(VectorMismatchError, match="other weights"):
        steerkit.explain(build("llama", seed=5), byte_tokenizer(CHATML), "hello", loaded)
    redrawn = build("llama")
    with torch.no_grad():
        for parameter in redrawn.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.flip(0))
    with pytest.raises(VectorMismatchError, match="other weights"):
        steerkit.steer(redrawn, loaded, 1.0)
    broken = {name: tensor for name, tensor in vector.tensors.items() if name != "shared/spread"}
    with pytest.raises(VectorMismatchError, match="shared/spread"):
        steerkit.steer(model, SteeringVector(**{**_fields(vector), "tensors": broken}), 1.0)


def test_a_gate_over_the_prompt_needs_all_of_it() -> None:
    model, vector = build("llama"), set_gain(fitted(readout="mean"), 0.9)
    with torch.no_grad():
        cached = model(input_ids=torch.tensor([SHORT[:2]]), use_cache=True).past_key_values
        with steerkit.steer(model, vector, STRENGTH), pytest.raises(ScopeError, match="cached before"):
            model.generate(torch.tensor([SHORT]), past_key_values=cached, max_new_tokens=2, do_sample=False)
        with steerkit.steer(model, vector, STRENGTH), pytest.raises(ScopeError, match="behind the first"):
            generate(model, [SHORT[:1]])


def test_two_gates_do_not_add_one_direction_twice() -> None:
    model, vector = build("llama"), set_gain(fitted(), 0.9)
    with pytest.raises(VectorMismatchError, match="twice"):
        steerkit.steer(model, [vector, vector], STRENGTH)


def test_activations_that_are_not_finite_are_refused() -> None:
    from steerkit.errors import ModelError

    model, vector = build("llama"), set_gain(fitted())
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[1, 1] = float("nan")
    with steerkit.steer(model, vector, STRENGTH), pytest.raises(ModelError, match="not finite"):
        generate(model, [SHORT])


def test_a_row_of_pads_alone_is_refused() -> None:
    model, vector = model_of("llama"), set_gain(fitted())
    ids = torch.tensor([SHORT, [0] * len(SHORT)])
    mask = torch.tensor([[1] * len(SHORT), [0] * len(SHORT)])
    with torch.no_grad(), steerkit.steer(model, vector, STRENGTH), pytest.raises(ScopeError, match="1 rows"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0, do_sample=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "fixed"}, "go together"),
        ({"fixed": [1.0]}, "go together"),
        ({"weights": "fixed", "fixed": [-1.0, 2.0]}, "not all 0"),
        ({"dead_zone": 1.0}, "dead_zone"),
        ({"hidden": 0}, "at least 1"),
        ({"rate": 0.0}, "over 0"),
        ({"schedule": "later"}, "allowed are"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        WeightedController.from_settings(settings)


def test_fixed_weights_are_one_per_block() -> None:
    with pytest.raises(FitError, match="3 weights for 4 blocks"):
        fitted(weights="fixed", fixed=(1.0, 1.0, 1.0))


def test_the_loop_keeps_the_best_state_and_ends_early() -> None:
    place = torch.zeros(1, requires_grad=True)
    seen: list[float] = []

    def judge() -> float:
        seen.append(float(place.detach()))
        return abs(float(place.detach()) - 0.3)

    history = minimise(
        [place], lambda rows: ((place - 1.0) ** 2).sum(), 4, Schedule(50, rate=0.1, patience=2), judge=judge
    )
    assert len(history) < 50
    assert float(place.detach()) == min(seen, key=lambda value: abs(value - 0.3))
    with pytest.raises(FitError, match="not finite"):
        minimise([place], lambda rows: (place * float("nan")).sum(), 4, Schedule(epochs=1))


def test_the_loop_sees_every_item_once_an_epoch_in_an_order_of_its_seed() -> None:
    place = torch.zeros(1, requires_grad=True)
    orders: list[list[int]] = []
    for seed in (0, 0, 1):
        rows: list[int] = []
        minimise(
            [place],
            lambda batch, rows=rows: (rows.extend(batch.tolist()), place.sum())[1],
            7,
            Schedule(epochs=2, batch_size=3, seed=seed),
        )
        assert sorted(rows[:7]) == sorted(rows[7:]) == list(range(7))
        orders.append(rows)
    assert orders[0] == orders[1] != orders[2]


def test_the_command_explains(answer: Callable[..., Any], cli: Any, here: Path, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    vector = set_gain(fitted(), 0.5)
    assert AutoModelForCausalLM.from_pretrained(tiny) is not None
    vector.save("controller.safetensors")
    rows = answer("explain", "one", "--vector", "controller.safetensors", "--model", tiny, "--strength", 0.2)
    assert rows[0]["gain"] == pytest.approx(0.5)
    assert list(rows[0]["blocks"].values()) == pytest.approx([0.1] * BLOCKS)
    shown = cli("explain", "one", "--vector", "controller.safetensors", "--model", tiny).out
    assert "dead zone" in " ".join(shown.split())
    assert all(len(line) <= 80 for line in shown.splitlines())
    inspected = cli("inspect", "controller.safetensors").out
    assert "controller" in inspected
    assert "sites looked at" not in inspected
    assert [line.split()[-1] for line in inspected.splitlines() if "gate reads" in line] == [str(vector.reads[0])]
    assert all(str(site) in inspected for site in vector.reads)


@pytest.mark.parametrize("name", ["conditional", "controller"])
def test_the_cards_and_inspect_say_where_a_shipped_gate_reads(name: str, cli: Any) -> None:
    folder = Path(__file__).parents[2] / "vectors" / "smollm2-135m"
    vector = SteeringVector.load(folder / f"refusal-{name}.safetensors")
    made = vector_card(f"refusal-{name}", vector).splitlines()
    figures = dict(vector.held_out["sites"])
    assert any("Separation" in line for line in made) == bool(figures)
    assert not any("Separation measured on" in line for line in made), "no listed site has figures"
    shown = " ".join(cli("inspect", folder / f"refusal-{name}.safetensors").out.split())
    assert "looked at" not in shown
    for site in vector.reads:
        assert f"`{site}`" in "\n".join(made)
        assert str(site) in shown.split("gate reads")[1].split("held out")[0]
    for one in figures.values():
        assert f"(held-out AUC {one['auc']:.3f}, d {one['cohens_d']:.2f})" in shown
