"""Tunable experts: the formulas written out slowly, on five families whose routers differ in all but their form."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.errors import FitError, ModelError, SiteError, StrengthError, VectorMismatchError
from steerkit.evaluate.curve import random_like
from steerkit.methods._expert_asking import AskedRouter, with_priority, without
from steerkit.methods._expert_choice import chance_relevance
from steerkit.methods.experts import Experts
from steerkit.network.bare_copy import bare_copy
from steerkit.network.decoder import find_decoder
from steerkit.network.routing import dense_weights, slotted
from steerkit.network.sites import Site
from steerkit.network.tap import RouterTap, locate
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector
from tests import modes, tolerances
from tests.families import VOCAB, build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

FAMILIES = ("olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
ASKABLE = tuple(name for name in FAMILIES if name != "deepseek_v3")
EXPERTS, SLOTS = 4, 2
IDS = torch.arange(3 * 17).mul(7919).remainder(VOCAB).reshape(3, 17)
GOOD = ["a bright and cheerful morning", "what a happy little town", "they danced with joy", "sunny and warm"]
BAD = ["a dull and gloomy morning", "what a weary little town", "they wept in grief", "bitter and cold"]
TOKENIZER = byte_tokenizer(CHATML)
AT = Site(2, "router")
model_of = functools.cache(build)


def data(*, paired: bool = True) -> ContrastSet:
    return ContrastSet.from_prompts(GOOD, BAD if paired else BAD[:3], raw=True, paired=paired)


def fitted(family: str = "olmoe", *, readout: Any = None, paired: bool = True, **settings: Any) -> SteeringVector:
    method = Experts.from_settings({"count": 4, **settings})
    return steerkit.fit(model_of(family), TOKENIZER, data(paired=paired), method=method, readout=readout)


def acting(family: str, dropped: tuple[int, ...] = (), forced: tuple[int, ...] = (), **settings: Any) -> SteeringVector:
    """A vector that does what is asked at one router."""
    from dataclasses import replace

    vector = fitted(family, count=1, **settings)
    action = torch.zeros(EXPERTS, dtype=torch.long)
    action[list(dropped)], action[list(forced)] = -1, 1
    own = {"action": action, "relevance": action.float(), "seen": torch.ones(EXPERTS), "slots": torch.tensor(SLOTS)}
    shared = {name: one for name, one in vector.tensors.items() if name.startswith("shared/")}
    tensors = shared | {f"{AT}/{name}": one for name, one in own.items()}
    return replace(vector, tensors=tensors, sites=(AT,), fitted_at=(AT,), norms={})


def run(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def tap_of(family: str) -> RouterTap:
    (tap,) = locate(model_of(family), [AT]).values()
    assert isinstance(tap, RouterTap)
    return tap


class Seen:
    """What the router and the MLP of one block give in a pass, after all that is done to it."""

    def __init__(self, family: str) -> None:
        self.tap = tap_of(family)
        self.read = self.logits = self.weights = self.index = self.mlp = torch.zeros(0)

    def __enter__(self) -> Seen:
        def router(_module: Any, args: Any, output: Any) -> None:
            self.read, (self.logits, self.weights, self.index) = args[0], output

        def mlp(_module: Any, _args: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            self.mlp = out.reshape(-1, out.shape[-1]).clone()

        self._handles = [
            self.tap.module.register_forward_hook(router),
            self.tap.owner.register_forward_hook(mlp),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def rows(self) -> list[dict[int, float]]:
        return [
            dict(zip(index, weights, strict=True))
            for index, weights in zip(self.index.tolist(), self.weights.tolist(), strict=True)
        ]


def both(family: str, vector: SteeringVector, strength: float = 1.0) -> tuple[Seen, Seen]:
    """What stands there without and with steering."""
    model = model_of(family)
    with Seen(family) as plain:
        run(model)
    with steerkit.steer(model, vector, strength), Seen(family) as steered:
        run(model)
    return plain, steered


def left_alone(family: str, plain: Seen, steered: Seen, row: int) -> None:
    """What a token's experts made of it is as it was, up to rounding.

    An expert multiplies all tokens that chose it at once, and how that product rounds depends on how many they are.
    """
    gap = tolerances.gap(steered.mlp[row], plain.mlp[row])
    assert gap <= tolerances.of_family(family), f"token {row}"


# ---------------------------------------------------------------------------------------------------------------------
# The dense form


def test_newcomers_take_the_slots_of_zeros_and_then_of_the_smallest() -> None:
    """Slot by slot, row by row, on random rows with none, one or several newcomers."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        index = torch.randperm(6, generator=draw)[None, :3]
        dense = torch.rand(1, 6, generator=draw) * (torch.rand(1, 6, generator=draw) < 0.5)
        values, slots = dense[0].tolist(), index[0].tolist()
        newcomers = sorted((e for e in range(6) if values[e] and e not in slots), key=lambda e: -values[e])
        order = sorted(range(3), key=lambda slot: values[slots[slot]])
        for slot, expert in zip(order, newcomers[:3], strict=False):
            slots[slot] = expert
        weights, found = slotted(dense, index)
        assert found[0].tolist() == slots
        assert weights[0].tolist() == [values[expert] for expert in slots]
        assert len(set(slots)) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_and_writing_back_is_the_identity(family: str) -> None:
    model, seen = model_of(family), []
    plain = run(model)
    tap = tap_of(family)
    now = Seen(family)
    handle = tap.attach(lambda h: (seen.append(h), h)[1])
    with now:
        assert torch.equal(run(model), plain)
    handle.remove()
    slow = torch.zeros(IDS.numel(), EXPERTS)
    for row, chosen in enumerate(now.rows()):
        for expert, weight in chosen.items():
            slow[row, expert] = weight
    assert torch.equal(seen[0], slow)
    assert torch.equal(dense_weights(now.weights, now.index, EXPERTS), slow)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recorded_is_the_share_or_the_mean_weight(family: str) -> None:
    model = model_of(family)
    texts = [*GOOD, *BAD]
    shares = steerkit.record(model, TOKENIZER, data(), [AT], readout="share")[AT]
    weights = steerkit.record(model, TOKENIZER, data(), [AT], readout="mean")[AT]
    for row, text in enumerate(texts):
        with Seen(family) as seen:
            run(model, torch.tensor([TOKENIZER(text)["input_ids"]]))
        kept = seen.rows()[1:]
        for expert in range(EXPERTS):
            assert float(shares[row, expert]) == pytest.approx(sum(expert in one for one in kept) / len(kept), abs=1e-6)
            mean = sum(one.get(expert, 0.0) for one in kept) / len(kept)
            assert float(weights[row, expert]) == pytest.approx(mean, abs=1e-5)
    response = ContrastSet.from_answers(
        [("How?", f" {good}.", f" {bad}.") for good, bad in zip(GOOD, BAD, strict=True)]
    )
    found = steerkit.record(model, TOKENIZER, response, [AT], readout="response_share")[AT]
    torch.testing.assert_close(found.sum(dim=1), torch.full((8,), float(SLOTS)))


# ---------------------------------------------------------------------------------------------------------------------
# The operations


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_of_zero_is_a_down_projection_of_zeros(family: str) -> None:
    model: Any = model_of(family)
    vector = acting(family, dropped=(1,), renormalise=False, side="negative")
    plain = run(model)
    with steerkit.steer(model, vector, 1.0):
        hooked = run(model)
    experts = tap_of(family).owner.experts
    kept = {name: one.detach().clone() for name, one in experts.named_parameters() if name.startswith("down_proj")}
    assert len(kept) == (2 if family == "gpt_oss" else 1)
    with torch.no_grad():
        for name in kept:
            experts.get_parameter(name)[1] = 0
        by_hand = run(model)
        for name, one in kept.items():
            experts.get_parameter(name).copy_(one)
    assert torch.equal(hooked, by_hand)
    with steerkit.edited(model, vector, 1.0):
        assert torch.equal(run(model), by_hand)
    with steerkit.edited(model, vector, 0.5):
        half = run(model)
    with steerkit.steer(model, vector, 0.5):
        assert float((run(model) - half).abs().max() / half.abs().max()) < tolerances.of_family(family)
    assert torch.equal(run(model), plain)
    assert not torch.equal(plain, by_hand)


@pytest.mark.parametrize("family", FAMILIES)
def test_drop_keeps_the_sum_and_leaves_other_tokens_alone(family: str) -> None:
    plain, steered = both(family, acting(family, dropped=(1,)))
    touched = 0
    for row, (before, after) in enumerate(zip(plain.rows(), steered.rows(), strict=True)):
        if 1 not in before:
            assert before == after
            left_alone(family, plain, steered, row)
            continue
        touched += 1
        rest = sum(weight for expert, weight in before.items() if expert != 1)
        slow = {e: 0.0 if e == 1 else w * sum(before.values()) / rest for e, w in before.items()}
        assert after == pytest.approx(slow, rel=1e-6, abs=1e-7)
        assert sum(after.values()) == pytest.approx(sum(before.values()), rel=3e-7)
    assert 0 < touched < len(plain.rows())


@pytest.mark.parametrize("family", FAMILIES)
def test_where_every_chosen_expert_is_dropped_all_weights_are_zero(family: str) -> None:
    plain, steered = both(family, acting(family, dropped=(0, 1, 2)))
    lost = [all(expert < 3 for expert in row) for row in plain.rows()]
    assert any(lost) and not all(lost)
    for gone, before, after in zip(lost, plain.rows(), steered.rows(), strict=True):
        assert sum(after.values()) == pytest.approx(0.0 if gone else sum(before.values()), rel=3e-7)


@pytest.mark.parametrize("forced", [(3,), (0, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_force_puts_the_expert_into_the_smallest_slot_of_every_token(family: str, forced: tuple[int, ...]) -> None:
    plain, steered = both(family, acting(family, forced=forced))
    touched = 0
    for row, (before, after) in enumerate(zip(plain.rows(), steered.rows(), strict=True)):
        assert len(after) == SLOTS, "no expert stands in two slots"
        assert set(forced) <= set(after)
        total = sum(before.values())
        assert sum(after.values()) == pytest.approx(total, rel=3e-7)
        lacking = [expert for expert in forced if expert not in before]
        if not lacking:
            assert before == after
            left_alone(family, plain, steered, row)
            continue
        touched += 1
        slow = dict(before)
        for _ in lacking:
            del slow[min((e for e in slow if e not in forced), key=lambda e: slow[e])]
        slow |= dict.fromkeys(lacking, total / SLOTS)
        scale = total / sum(slow.values())
        assert after == pytest.approx({e: w * scale for e, w in slow.items()}, rel=1e-6)
    assert touched


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_and_strength_lead_part_of_the_way(family: str) -> None:
    for vector, factor in ((acting(family, dropped=(1,), op="scale", factor=3.0), 3.0), (acting(family, (1,)), 0.0)):
        for strength in (0.5, -0.5):
            plain, steered = both(family, vector, strength)
            for before, after in zip(plain.rows(), steered.rows(), strict=True):
                total = sum(before.values())
                new = {e: w * (factor if e == 1 else 1.0) for e, w in before.items()}
                new = {e: w * total / sum(new.values()) for e, w in new.items()}
                slow = {e: max(0.0, (1 - strength) * before[e] + strength * new[e]) for e in before}
                assert after == pytest.approx(slow, rel=1e-5, abs=1e-6)
    model = model_of(family)
    unsteered = run(model)
    with steerkit.steer(model, acting(family, dropped=(1,), forced=(3,)), 0.0):
        assert torch.equal(run(model), unsteered)
    plain, steered = both(family, acting(family, dropped=(1,), forced=(3,)), 0.0)
    assert plain.rows() == steered.rows()


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_a_newcomer_grows_with_the_strength_and_the_sum_stays(strength: float) -> None:
    plain, steered = both("mixtral", acting("mixtral", forced=(3,)), strength)
    for before, after in zip(plain.rows(), steered.rows(), strict=True):
        assert len(after) == SLOTS
        assert sum(after.values()) == pytest.approx(1.0, abs=3e-7)
        if 3 not in before:
            (kept,) = set(after) - {3}
            assert kept == max(before, key=lambda e: before[e])
            whole = (before[kept], 0.5)
            full = {kept: whole[0] / sum(whole), 3: whole[1] / sum(whole)}
            slow = {kept: (1 - strength) * before[kept] + strength * full[kept], 3: strength * full[3]}
            assert after == pytest.approx({e: w / sum(slow.values()) for e, w in slow.items()}, rel=1e-5)


@pytest.mark.parametrize("dropped", [(1,), (0, 2)])
@pytest.mark.parametrize("family", ASKABLE)
def test_replace_is_asking_for_more_and_striking_and_minus_infinity(family: str, dropped: tuple[int, ...]) -> None:
    """The router is asked for k + m by its own `top_k`; where it does not normalise, 1 / (1 - banned) does."""
    plain, steered = both(family, acting(family, dropped=dropped, op="replace"))
    more: Any = bare_copy(plain.tap.module)
    more.top_k = SLOTS + len(dropped)
    banned = torch.softmax(plain.logits.float(), dim=-1)[:, list(dropped)].sum(dim=-1).tolist()
    _, weights, index = more(plain.read)
    changed = 0
    for row, (chosen, values) in enumerate(zip(index.tolist(), weights.tolist(), strict=True)):
        kept = [(e, w) for e, w in zip(chosen, values, strict=True) if e not in dropped][:SLOTS]
        total = sum(w for _, w in kept)
        by = 1 / (1 - banned[row]) if family == "olmoe" else 1 / total
        assert steered.rows()[row] == pytest.approx({e: w * by for e, w in kept}, rel=2e-6)
        scores = plain.logits[row].float().clone()
        scores[list(dropped)] = -torch.inf
        own = scores.softmax(dim=-1)
        minus = {e: float(own[e]) for e in own.topk(SLOTS).indices.tolist()}
        scale = 1.0 if family == "olmoe" else sum(minus.values())
        assert steered.rows()[row] == pytest.approx({e: w / scale for e, w in minus.items()}, rel=2e-6)
        changed += set(steered.rows()[row]) != set(plain.rows()[row])
        if family != "olmoe" and not set(dropped) & set(plain.rows()[row]):
            left_alone(family, plain, steered, row)
    assert changed


def test_steermoe_on_its_published_example() -> None:
    """Scores 2, 1, 0, -1, two slots: forcing 3 gives {3, 0} at .5025, .4975, dropping 0 {1, 2} at .7311, .2689."""
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for action, wanted in (((0, 0, 0, 1), {3: 0.5025, 0: 0.4975}), ((-1, 0, 0, 0), {1: 0.7311, 2: 0.2689})):
        changed = with_priority(scores, torch.tensor(action))[0]
        top = changed.topk(SLOTS)
        found = dict(zip(top.indices.tolist(), top.values.softmax(dim=-1).tolist(), strict=True))
        assert found == pytest.approx(wanted, abs=5e-5)


@pytest.mark.parametrize("family", ASKABLE)
def test_steermoe_asks_the_router_with_other_scores(family: str) -> None:
    plain, steered = both(family, acting(family, dropped=(1,), forced=(3,), op="steermoe"))
    for row, after in enumerate(steered.rows()):
        logs = plain.logits[row].float().log_softmax(dim=-1)
        high, low = float(logs.max()) + 0.01, float(logs.min()) - 0.01
        logs[3], logs[1] = high, low
        own = logs.softmax(dim=-1)
        slow = {e: float(own[e]) for e in own.topk(SLOTS).indices.tolist()}
        scale = 1.0 if family == "olmoe" else sum(slow.values())
        assert after == pytest.approx({e: w / scale for e, w in slow.items()}, rel=1e-5)
        assert 3 in after


@pytest.mark.parametrize("mode", ["cached", "uncached", "left_padded", "per_row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_is_one_plain_pass(family: str, mode: str) -> None:
    model = model_of(family)
    for one, expected, baseline in modes.run_steered(model, mode, fitted(family), 1.0):
        assert modes.gap(one, expected) < tolerances.of_family(family)
        assert modes.gap(one, baseline) > 1e-4


@pytest.mark.parametrize("op", ["replace", "steermoe"])
def test_asking_is_the_same_in_every_mode(op: str) -> None:
    for one, expected, baseline in modes.run_steered(model_of("qwen3_moe"), "left_padded", fitted("qwen3_moe", op=op)):
        assert modes.gap(one, expected) < tolerances.of_family("qwen3_moe")
        assert modes.gap(one, baseline) > 1e-4


def test_scope_and_rows_keep_tokens_apart() -> None:
    """T = b t is flattened: what is not meant comes back bitwise, row by row and token by token."""
    model, family = model_of("mixtral"), "mixtral"
    vector = acting(family, dropped=(0, 1)).at(scope="response")
    with Seen(family) as plain:
        run(model)
    with steerkit.steer(model, vector, [1.0, 0.0, 1.0], prompt_lengths=[9, 9, 12]), Seen(family) as steered:
        run(model)
    meant = torch.zeros(3, 17, dtype=torch.bool)
    meant[0, 8:], meant[2, 11:] = True, True
    had = torch.tensor([bool({0, 1} & set(row)) for row in plain.rows()])
    changed = torch.tensor([a != b for a, b in zip(plain.rows(), steered.rows(), strict=True)])
    assert torch.equal(changed, had & meant.flatten())
    assert changed.any()


# ---------------------------------------------------------------------------------------------------------------------
# The fit


def slow_shares(family: str, texts: list[str]) -> Tensor:
    """[n, layers, experts] share of each text's tokens but the first."""
    model = model_of(family)
    sites = Experts().sites(find_decoder(model))
    rows = []
    for text in texts:
        found: dict[Site, Tensor] = {}
        handles = [
            tap.module.register_forward_hook(lambda _m, _a, out, site=site, found=found: found.update({site: out[2]}))
            for site, tap in locate(model, sites).items()
        ]
        run(model, torch.tensor([TOKENIZER(text)["input_ids"]]))
        for handle in handles:
            handle.remove()
        chosen = torch.stack([found[site][1:] for site in sites])
        rows.append(torch.stack([(chosen == e).any(dim=-1).double().mean(dim=-1) for e in range(EXPERTS)], dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_differences_of_all_layers_are_chosen_by_their_sign(family: str) -> None:
    positive, negative = slow_shares(family, GOOD), slow_shares(family, BAD)
    relevance = (positive.mean(0) - negative.mean(0)).flatten()
    sites = Experts().sites(find_decoder(model_of(family)))
    assert len(sites) == (3 if family == "deepseek_v3" else 4)
    vector = fitted(family)
    wanted = sorted(range(len(relevance)), key=lambda place: -abs(float(relevance[place])))[:4]
    chosen = {
        (site, expert): int(vector.params(site)["action"][expert])
        for site in vector.sites
        for expert in vector.params(site)["action"].nonzero()[:, 0].tolist()
    }
    least = abs(float(relevance[wanted[-1]]))
    for (site, expert), sign in chosen.items():
        value = float(relevance[sites.index(site) * EXPERTS + expert])
        assert abs(value) >= least - 1e-6
        assert sign == (1 if value > 0 else -1)
        assert float(vector.params(site)["relevance"][expert]) == pytest.approx(value, abs=1e-6)
    assert len(chosen) == 4
    lengths = [torch.tensor([len(TOKENIZER(text)["input_ids"]) - 1.0 for text in side]) for side in (GOOD, BAD)]
    site = vector.sites[0]
    seen = sum(n.double() @ side[:, sites.index(site)] for n, side in zip(lengths, (positive, negative), strict=True))
    torch.testing.assert_close(vector.params(site)["seen"].double(), seen, rtol=1e-4, atol=1e-3)
    assert {*fitted(family, side="negative").params(fitted(family, side="negative").sites[0])["action"].tolist()} <= {
        0,
        -1,
    }


@pytest.mark.parametrize("paired", [True, False])
def test_the_null_is_the_largest_difference_under_shuffled_labels(paired: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    positive, negative = (torch.rand(n, 12, generator=draw) for n in ((6, 6) if paired else (7, 5)))
    found = chance_relevance(positive, negative, paired=paired, shuffles=4000, seed=1)
    largest = []
    for _ in range(4000):
        if paired:
            flip = torch.rand(6, 1, generator=draw) < 0.5
            one, other = torch.where(flip, negative, positive), torch.where(flip, positive, negative)
        else:
            rows = torch.cat([positive, negative])[torch.randperm(12, generator=draw)]
            one, other = rows[:7], rows[7:]
        largest.append(float((one.mean(0) - other.mean(0)).abs().max()))
    slow = sorted(largest)[int(0.99 * 4000)]
    assert found == pytest.approx(slow, rel=0.03)


def test_the_null_holds_the_rate_that_it_promises() -> None:
    """Sides without any difference pass their own null in about one fit of a hundred."""
    draw = torch.Generator().manual_seed(5)
    passed = 0
    for number in range(200):
        one, other = (torch.rand(8, 30, generator=draw) for _ in range(2))
        null = chance_relevance(one, other, paired=True, shuffles=200, seed=number)
        passed += float((one.mean(0) - other.mean(0)).abs().max()) > null
    assert passed <= 8  # 200 draws of 1 or 2 % each


def test_held_out_items_lie_apart_along_what_was_learned_and_a_monitor_reads_it() -> None:
    pairs = ContrastSet.from_prompts([*GOOD, *GOOD], [f"{bad}{end}" for end in "!?" for bad in BAD], raw=True)
    train, held_out = pairs.split(held_out=0.25, seed=0)
    model = model_of("mixtral")
    vector = steerkit.fit(model, TOKENIZER, train, method=Experts(count=2), held_out=held_out)
    assert vector.reads == vector.sites
    assert {*vector.held_out["sites"]} == {str(site) for site in vector.sites}
    assert all(found["auc"] >= 0.5 for found in vector.held_out["sites"].values())
    site, chat = vector.sites[0], [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well, yes"}]
    monitor = steerkit.Monitor(model, TOKENIZER, vector, sites=[site], read="response_mean", calibrated=False)
    weights = steerkit.record(model, TOKENIZER, [chat], [site], readout="response_mean")[site][0]
    along = Experts().read_direction(vector.params(site))
    assert float(monitor.score([chat])) == pytest.approx(float(weights @ along / along.norm()), rel=1e-4)


def test_its_table_says_what_is_above_chance() -> None:
    vector = fitted()
    table = Experts().table(vector)
    assert table.columns == ("layer", "expert", "is", "R", "tokens seen", "above null")
    sizes = [abs(float(row[3])) for row in table.rows]
    assert sizes == sorted(sizes, reverse=True)
    null = float(vector.tensors["shared/null"])
    assert [row[5] == "yes" for row in table.rows] == [size > null for size in sizes]
    assert f"of 4 above {null:.3f}" in table.note
    assert {row[2] for row in table.rows} <= {"dropped", "forced"}


def test_tokens_that_lose_every_expert_are_counted() -> None:
    vector = fitted("mixtral", count=8, side="negative")
    share = float(vector.tensors["shared/silenced"])
    silent = total = 0
    model: Any = model_of("mixtral")
    for text in (*GOOD, *BAD):
        found: dict[Site, Tensor] = {}
        handles = [
            tap.module.register_forward_hook(lambda _m, _a, out, site=site, found=found: found.update({site: out[2]}))
            for site, tap in locate(model, vector.sites).items()
        ]
        run(model, torch.tensor([TOKENIZER(text)["input_ids"]]))
        for handle in handles:
            handle.remove()
        for site, index in found.items():
            lost = [all(int(vector.params(site)["action"][e]) < 0 for e in row) for row in index.tolist()]
            silent, total = silent + sum(lost), total + len(lost)
    assert share == pytest.approx(silent / total, abs=1e-6)
    assert share > 0
    assert f"at {share:.1%} of the tokens" in Experts().table(vector).note


def test_the_control_is_as_many_other_experts_of_like_usage() -> None:
    from dataclasses import replace

    draw = torch.Generator().manual_seed(0)
    vector, site = acting("mixtral", dropped=(1,)), AT
    usage = torch.randperm(64, generator=draw).float()
    action = torch.zeros(64, dtype=torch.long)
    action[usage.argsort()[50:54]], action[usage.argsort()[5]] = -1, 1
    wide = {f"{AT}/action": action, f"{AT}/seen": usage, f"{AT}/relevance": usage}
    vector = replace(vector, tensors={**vector.tensors, **wide})
    other = random_like(vector, seed=1).params(site)["action"]
    for sign in (-1, 1):
        assert int((other == sign).sum()) == int((action == sign).sum())
    assert not bool(((other != 0) & (action != 0)).any())
    assert all(int(usage[e]) in range(42, 62) for e in (other == -1).nonzero()[:, 0].tolist())
    assert not torch.equal(other, random_like(vector, seed=2).params(site)["action"])
    with pytest.raises(FitError, match="has 1 experts that are left alone for 3"):
        random_like(acting("mixtral", dropped=(0, 1, 2)), seed=0)


def test_hundreds_of_experts_are_one_write() -> None:
    """A mask of one expert and one of hundreds run the same operations on tensors of the same sizes."""
    from torch.utils.flop_counter import FlopCounterMode

    method, wide = Experts(), 512
    h = dense_weights(torch.rand(64, 8), torch.rand(64, wide).topk(8).indices, wide)[None]
    counts = []
    for dropped in (1, 400):
        action = torch.zeros(wide, dtype=torch.long)
        action[:dropped] = -1
        params = {"action": action, "slots": torch.tensor(8)}
        prepared = method.prepare(params, torch.tensor(1.0), torch.float32, torch.device("cpu"))
        with FlopCounterMode(display=False) as flops, torch.profiler.profile() as profile:
            method.edit(h, prepared, None)  # type: ignore[arg-type]
        assert flops.get_total_flops() == 0
        counts.append(sorted(event.name for event in profile.events() if event.name.startswith("aten::")))
    assert counts[0] == counts[1]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_blocks_without_a_router_are_refused_with_those_that_have_one() -> None:
    with pytest.raises(SiteError, match=r"router\.0: `mlp` routes no tokens .*; there are routers in blocks 1-3"):
        locate(model_of("deepseek_v3"), [Site(0, "router")])
    with pytest.raises(
        SiteError, match=r"router\.0: `mlp` routes no tokens to experts \(block 0 of LlamaForCausalLM\)"
    ):
        steerkit.fit(model_of("llama"), TOKENIZER, data(), method="experts")
    import transformers as tf

    from tests.families import GROUPED, QUIET

    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    mixed = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GROUPED, **QUIET, **sizes, mlp_only_layers=[1])).eval()
    with pytest.raises(SiteError, match=r"there are routers in blocks 0\+2\+3|there are routers in blocks 0\+2-3"):
        locate(mixed, [Site(1, "router")])


@pytest.mark.parametrize("family", ["llama4_text", "jetmoe", "granitemoehybrid"])
def test_routers_of_another_form_are_refused_in_a_line(family: str) -> None:
    with pytest.raises(SiteError) as caught:
        Experts().sites(find_decoder(model_of(family)))
    assert str(caught.value).startswith("router.0: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("experts", [8, 128])
def test_many_experts_in_half_precision_can_be_asked(experts: int, dtype: torch.dtype) -> None:
    import transformers as tf

    sizes = {"hidden_size": 160, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 6}
    config = tf.Qwen3MoeConfig(vocab_size=VOCAB, num_experts=experts, norm_topk_prob=True, **sizes, **heads)
    model = tf.Qwen3MoeForCausalLM(config).to(dtype).eval()
    site = Site(0, "router")
    tap = locate(model, [site])[site]
    assert isinstance(tap, RouterTap)
    action = torch.zeros(experts, dtype=torch.long)
    action[:2] = -1
    read = torch.randn(40, 160, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = tap.module(read)[0].float()
        found = AskedRouter(tap, action, without)(read)
    logits[:, :2] = -torch.inf
    weights, index = logits.softmax(dim=-1).topk(6)
    slow = dense_weights(weights / weights.sum(dim=-1, keepdim=True), index, experts)
    assert float((found.sum(dim=-1) - 1).abs().max()) < 1e-6
    same = ((found > 0) == (slow > 0)).all(dim=-1)  # equal scores at the last slot may fall either way
    assert float(same.float().mean()) > (0.99 if dtype == torch.float32 else 0.6)
    torch.testing.assert_close(found[same], slow[same], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", ["replace", "steermoe"])
def test_a_router_that_corrects_its_choice_cannot_be_asked(op: str) -> None:
    with pytest.raises(SiteError, match=r"corrects its choice by `e_score_correction_bias`.*use op='drop'"):
        fitted("deepseek_v3", op=op)


def test_a_kernel_that_stands_in_for_the_mlp_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("gpt_oss")
    vector = acting("gpt_oss", dropped=(1,))
    block = locate(model, [AT])[AT].owner  # type: ignore[attr-defined]
    with steerkit.steer(model, vector, 1.0):
        run(model)
        monkeypatch.setattr(block, "forward", lambda h: (h, None))
        with pytest.raises(
            ModelError, match=r"router\.2: the MLP ran without `model\.layers\.2\.mlp\.router`.*use_kernels"
        ):
            run(model)
    with pytest.raises(SiteError, match=r"in code that no hook sees into; load the model with use_kernels=False"):
        locate(model, [AT])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"side": "negative"}, "renormalise moves the weights of the other experts"),
        ({"side": "positive", "renormalise": False}, "forced experts are given to tokens that did not choose them"),
        ({"op": "replace"}, "op 'replace' lets other experts act"),
        ({"op": "steermoe"}, "op 'steermoe' lets other experts act"),
    ],
)
def test_only_what_scales_single_experts_goes_into_weights(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(StrengthError, match=words), steerkit.edited(model_of("mixtral"), fitted("mixtral", **settings)):
        pass


def test_settings_and_files_that_cannot_be_are_refused() -> None:
    for settings, words in (
        ({"count": 0}, "count = 0"),
        ({"shuffles": 5}, "shuffles = 5"),
        ({"factor": -1.0}, "factor"),
    ):
        with pytest.raises(FitError, match=words):
            Experts.from_settings(settings)
    with pytest.raises(SiteError, match=r"mlp_out\.1: experts are steered where they are chosen; ask for router\.1"):
        steerkit.fit(model_of("mixtral"), TOKENIZER, data(), method="experts", sites=["mlp_out.1"])
    same = ContrastSet.from_prompts(GOOD, GOOD[::-1], raw=True)
    with pytest.raises(FitError, match="the two sides are routed alike"):
        steerkit.fit(model_of("mixtral"), TOKENIZER, same, method="experts")
    params = dict(acting("mixtral", dropped=(1,)).params(AT))
    with pytest.raises(VectorMismatchError, match="more experts are forced than a token gets"):
        Experts().check(AT, {**params, "action": torch.ones(EXPERTS, dtype=torch.long)})
    assert Experts.steermoe(count=5).settings["op"] == "steermoe"
