"""Reading in one place and writing in another: every way to run a model gives each row what its own gate decided."""

from __future__ import annotations

import copy
import functools
import itertools
import threading
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import steerkit
from steerkit.errors import ModelError, ScopeError
from steerkit.methods import _conditional_gate, _gate
from steerkit.methods._thresholds import score
from steerkit.network.sites import Site
from steerkit.steering import replay as passes
from tests import gated, modes, tolerances
from tests.choices import mostly_slow, needs_bfloat16_attention
from tests.families import FAMILIES, build
from tests.gated import LONG, REPEATED, SHORT, gated_vector
from tests.pairwise import covering

OPEN = {SHORT, REPEATED}
PLACES = {"late": (Site(3), Site(1)), "early": (Site(1), Site(2))}


@functools.cache
def model_of(family: str) -> Any:
    return build(family).eval()


@functools.cache
def vector_of(family: str, place: str = "late", readout: str = "last") -> Any:
    read, write = PLACES[place]
    return gated_vector(model_of(family), read=read, write=write, readout=readout)


def check_mode(family: str, mode: str, place: str, readout: str = "last") -> None:
    model, vector = model_of(family), vector_of(family, place, readout)
    given: Any = list(modes.PER_ROW) if mode.startswith("per_row") else 1.0
    lengths = [len(SHORT), len(LONG), 4] if mode == "right_padded_forward" else None
    with torch.no_grad():
        baseline = modes.MODES[mode](model)
        with steerkit.steer(model, vector, given, prompt_lengths=lengths):
            ran = modes.MODES[mode](model)
    for one, other in zip(ran, baseline, strict=True):
        opens = tuple(one.prompt) in OPEN or mode == "continued"
        own = 1.0 if one.strength is None else one.strength
        expected = modes.reference(
            model,
            one,
            lambda ran, own=own, opens=opens: gated.as_decided(model, vector, ran.prompt, opens=opens, strength=own),
        )
        where = f"{family} {mode} {place} {'open' if opens else 'closed'}"
        assert modes.gap(one, expected) < tolerances.of_family(family), where
        if opens and not one.processed:
            assert modes.gap(one, modes.reference(model, one, lambda _: modes.no_steering())) > 1e-3, where
        if not opens and not one.processed and mode != "num_return_sequences" and not mode.startswith("per_row_"):
            assert one.answer == other.answer, where
            if family not in ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_next"):  # experts mix the rows of a batch
                assert torch.equal(one.logits, other.logits), f"{where}: not bitwise the baseline model"


CELLS = [cell for cell in itertools.product(FAMILIES, modes.MODES, PLACES) if cell[:2] not in modes.EXCEPTIONS]
CHOICE = covering(CELLS)


def check_cells(cells: Iterable[Any]) -> None:
    failures = []
    for family, mode, place in cells:
        try:
            check_mode(family, mode, place)
        except Exception as error:  # noqa: BLE001 - every mode of a family is run before it is judged
            failures.append(f"{mode} {place}: {type(error).__name__}: {error}"[:300])
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ["llama", "gpt2", "gemma3_text", "mamba", "qwen3_next"]))
def test_a_choice_of_modes_and_places(family: str) -> None:
    check_cells(cell for cell in CHOICE if cell[0] == family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", PLACES)
def test_every_mode(family: str, place: str) -> None:
    check_cells(cell for cell in CELLS if cell[0] == family and cell[2] == place)


@pytest.mark.parametrize(
    "family", mostly_slow(["llama", "gpt2", "gemma2", "qwen3_next", "mamba", "bloom"], ["llama", "qwen3_next", "mamba"])
)
@pytest.mark.parametrize("place", PLACES)
def test_every_mode_with_a_condition_on_the_mean(family: str, place: str) -> None:
    for mode in ("cached", "left_padded", "beams", "chunked_prefill", "uncached", "right_padded_forward"):
        if (family, mode) not in modes.EXCEPTIONS:
            check_mode(family, mode, place, readout="mean")


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("mode", ["chunked_prefill", "chunked_to_one", "static_cache", "left_padded"])
def test_an_open_gate_on_the_long_prompt(family: str, mode: str) -> None:
    """The prompts change sides: the long one, longer than the sliding windows, is written."""
    model = model_of(family)
    vector = gated_vector(model, opens=(LONG,), closes=(SHORT, SHORT[:4]))
    with torch.no_grad(), steerkit.steer(model, vector):
        ran = modes.MODES[mode](model)
    for one in ran:
        context = gated.as_decided(model, vector, one.prompt, opens=one.prompt == LONG)
        expected = modes.reference(model, one, lambda _, context=context: context)
        assert modes.gap(one, expected) < tolerances.of_family(family)


GREEDY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def generate(model: Any, prompts: Any, side: str = "left", **options: Any) -> Any:
    ids, mask = modes.rows_of(prompts, side=side)
    with torch.no_grad():
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            output_logits=True,
            return_dict_in_generate=True,
            **{**GREEDY, **options},
        )


def hooks(model: Any) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral", "bloom"])
def test_acceptance_02_closed_rows_keep_their_first_logits_and_cache_bitwise(family: str) -> None:
    model, vector = model_of(family), vector_of(family)
    prompts = [SHORT, LONG, SHORT[:4]]
    baseline = generate(model, prompts)
    with steerkit.steer(model, vector):
        ran = generate(model, prompts)
    for step, (one, other) in enumerate(zip(ran.logits, baseline.logits, strict=True)):
        assert torch.equal(one[1:], other[1:]), step
        assert torch.equal(torch.signbit(one[1:]), torch.signbit(other[1:]))
    assert not torch.equal(ran.logits[0][0], baseline.logits[0][0])
    changed = False
    for mine, theirs in zip(ran.past_key_values.layers, baseline.past_key_values.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape
        assert torch.equal(mine.keys[1:], theirs.keys[1:])
        assert torch.equal(mine.values[1:], theirs.values[1:])
        changed |= not torch.equal(mine.keys[0], theirs.keys[0])
    assert changed


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_acceptance_02_an_open_row_at_strength_0_is_bitwise_bare_beside_a_steered_one(family: str) -> None:
    """The part that is fed again is another matrix product than the whole pass, so only written rows may take it."""
    model, vector = model_of(family), vector_of(family)
    prompts = [SHORT, REPEATED, LONG]  # open, open, closed
    baseline = generate(model, prompts, num_beams=2)
    with steerkit.steer(model, vector, [0.0, 1.0, 1.0]):
        beams = generate(model, prompts, num_beams=2)
        ran = generate(model, prompts)
    assert torch.equal(beams.logits[0][[0, 1, 4, 5]], baseline.logits[0][[0, 1, 4, 5]])
    baseline = generate(model, prompts)
    for one, other in zip(ran.logits, baseline.logits, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert not torch.equal(ran.logits[0][1], baseline.logits[0][1])
    for mine, theirs in zip(ran.past_key_values.layers, baseline.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys[[0, 2]], theirs.keys[[0, 2]])
        assert torch.equal(mine.values[[0, 2]], theirs.values[[0, 2]])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "qwen3_next"])
def test_acceptance_02_experts_mix_rows_by_rounding_and_from_the_second_step_on_only(family: str) -> None:
    model, vector = model_of(family), vector_of(family)
    baseline = generate(model, [SHORT, LONG, SHORT[:4]])
    with steerkit.steer(model, vector):
        ran = generate(model, [SHORT, LONG, SHORT[:4]])
    assert torch.equal(ran.logits[0][1:], baseline.logits[0][1:])
    for one, other in zip(ran.logits, baseline.logits, strict=True):
        assert tolerances.gap(one[1:], other[1:]) < tolerances.of_family(family)


def test_acceptance_02_a_batch_of_closed_rows_is_bitwise_bare() -> None:
    model, vector = model_of("llama"), vector_of("llama")
    baseline = generate(model, [LONG, SHORT[:4]])
    with steerkit.steer(model, vector):
        ran = generate(model, [LONG, SHORT[:4]])
    assert torch.equal(ran.sequences, baseline.sequences)
    assert all(torch.equal(one, other) for one, other in zip(ran.logits, baseline.logits, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "qwen3_next"])
def test_acceptance_03_a_row_is_the_same_alone_padded_and_in_a_mixed_batch(family: str) -> None:
    model, vector = model_of(family), vector_of(family)
    tolerance = tolerances.of_family(family)
    for prompt, opens in ((SHORT, True), (LONG, False)):
        with steerkit.steer(model, vector):
            alone = torch.stack(generate(model, [prompt]).logits)[:, 0]
            mixed = torch.stack(generate(model, [SHORT, LONG, SHORT[:4]]).logits)[:, 0 if opens else 1]
        assert (alone - mixed).abs().max() / alone.abs().max() < tolerance
        answer = [12, 77, 31]
        for side in ("left", "right"):
            rows = [[*prompt, *answer], [*LONG, *answer], [*SHORT[:4], *answer]]
            ids, mask = modes.rows_of(rows, side=side)
            if family == "mamba" and side == "left":
                continue  # its convolution reads the pads of a plain forward pass
            lengths = [len(row) - len(answer) for row in rows]
            with torch.no_grad(), steerkit.steer(model, vector, prompt_lengths=lengths):
                logits = model(ids, attention_mask=mask, use_cache=False, **modes.positions_of(model, mask)).logits[0]
            real = logits[mask[0].bool()]
            with gated.as_decided(model, vector, prompt, opens=opens):
                expected = modes.plain_logits(model, rows[0])
            assert (real - expected).abs().max() / expected.abs().max() < tolerance, side


def test_acceptance_03_the_right_padded_prompt_alone() -> None:
    """Pads behind the prompt: its last real token decides, not the row's last column."""
    model, vector = model_of("llama"), vector_of("llama")
    ids, mask = modes.rows_of([SHORT, LONG, SHORT[:4]], side="right")
    with torch.no_grad(), steerkit.steer(model, vector, prompt_lengths=[len(SHORT), len(LONG), 4]):
        logits = model(ids, attention_mask=mask).logits
    for row, prompt in enumerate((SHORT, LONG, SHORT[:4])):
        with gated.as_decided(model, vector, prompt, opens=prompt in OPEN):
            expected = modes.plain_logits(model, prompt)[-1]
        assert (logits[row, len(prompt) - 1] - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_acceptance_04_replay_equals_a_second_pass_patched_at_the_last_prompt_token(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, vector = model_of(family), vector_of(family)
    used: list[str] = []
    for name in ("_again", "_probe"):
        real = getattr(passes._Replayer, name)
        monkeypatch.setattr(
            passes._Replayer, name, lambda self, *args, name=name, real=real: (used.append(name), real(self, *args))[1]
        )
    with steerkit.steer(model, vector):
        replayed = generate(model, [SHORT, LONG])
        assert used == ["_again"]
        used.clear()
        probed = generate(model, [SHORT, LONG], use_cache=False)
        assert used == ["_probe"]
    assert torch.equal(replayed.sequences, probed.sequences)
    for one, other in zip(replayed.logits, probed.logits, strict=True):
        assert (one - other).abs().max() / other.abs().max() < tolerances.of_family(family)
    assert modes.run_steered(model, "cached", gated.plain_of(vector))[0][0].answer == replayed.sequences[0, 9:].tolist()


@needs_bfloat16_attention
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_over_a_prompt_is_in_float32_under_autocast(dtype: torch.dtype, monkeypatch: Any) -> None:
    """Half precision would be coarse, and in float16 the sum over a long prompt infinite."""
    model, vector = build("llama").eval(), vector_of("llama", readout="mean")
    model.model.embed_tokens.weight.data *= 2e4 / model.model.embed_tokens.weight.abs().max()
    read, found = [], []
    add, decide = _gate.Gate._add, _conditional_gate.ConditionsGate.decide
    monkeypatch.setattr(_gate.Gate, "_add", lambda self, site, h, *rest: (read.append(h), add(self, site, h, *rest)))
    monkeypatch.setattr(
        _conditional_gate.ConditionsGate,
        "decide",
        lambda self, rows: (found.append(rows[gated.READ]), decide(self, rows))[1],
    )
    prompt = [5, 17, 44, 9] * 30
    with torch.no_grad(), torch.autocast("cpu", dtype), steerkit.steer(model, vector, prompt_lengths=len(prompt)):
        model(torch.tensor([prompt]), use_cache=False)
    exact = read[0][:, 1:].double().mean(dim=1)
    assert exact.abs().max() * len(prompt) > torch.finfo(torch.float16).max
    assert (found[0] - exact).norm() / exact.norm() < 1e-6


def test_acceptance_05_nothing_leaks_from_one_generate_to_the_next() -> None:
    model, vector = model_of("llama"), vector_of("llama")
    baseline = {prompt: generate(model, [prompt]).sequences for prompt in (SHORT, LONG)}
    with steerkit.steer(model, vector):
        first = generate(model, [SHORT]).sequences
        for _ in range(2):
            assert torch.equal(generate(model, [LONG]).sequences, baseline[LONG])
            assert torch.equal(generate(model, [SHORT]).sequences, first)
    assert not torch.equal(first, baseline[SHORT])
    assert torch.equal(generate(model, [SHORT]).sequences, baseline[SHORT])


def test_acceptance_05_the_caller_s_own_tensor_changed_in_place_is_a_new_prompt() -> None:
    model = model_of("llama")
    other = (*SHORT[:5], 200)
    vector = gated_vector(model, opens=(SHORT,), closes=(other,))
    ids = torch.tensor([SHORT])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        baseline = model.generate(torch.tensor([other]), attention_mask=mask, **GREEDY)
        with steerkit.steer(model, vector):
            opened = model.generate(ids, attention_mask=mask, **GREEDY)
            ids[0, 5] = 200
            assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), baseline)
            ids[0, 5] = SHORT[5]
            assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), opened)


def test_acceptance_05_two_models_are_independent() -> None:
    first, second = model_of("llama"), model_of("gpt2")
    one, other = vector_of("llama"), vector_of("gpt2")
    alone = []
    for model, vector in ((first, one), (second, other)):
        with steerkit.steer(model, vector):
            alone.append(generate(model, [SHORT, LONG]).sequences)
    with steerkit.steer(first, one), steerkit.steer(second, other):
        assert torch.equal(generate(second, [SHORT, LONG]).sequences, alone[1])
        assert torch.equal(generate(first, [SHORT, LONG]).sequences, alone[0])


def test_acceptance_06_beams_and_returned_sequences_inherit_their_prompt_s_decision() -> None:
    for mode in ("beams", "num_return_sequences", "per_row_beams", "per_row_returned"):
        check_mode("gpt2", mode, "late")
        check_mode("gpt2", mode, "early")


@pytest.mark.parametrize("where", ["forward", "processor"])
def test_acceptance_12_an_error_inside_generate_leaves_no_hook_and_no_state(where: str) -> None:
    model, vector = build("llama"), vector_of("llama")
    before = hooks(model)
    baseline = generate(model, [LONG]).sequences

    def broken(*_args: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), steerkit.steer(model, vector):
        expected = generate(model, [SHORT]).sequences
        if where == "processor":
            generate(model, [SHORT], logits_processor=[broken])
        handle = model.model.layers[2].register_forward_hook(broken)
        try:
            generate(model, [SHORT])
        finally:
            handle.remove()
    assert hooks(model) == before
    assert torch.equal(generate(model, [LONG]).sequences, baseline)
    with steerkit.steer(model, vector):
        assert torch.equal(generate(model, [SHORT]).sequences, expected)
        assert torch.equal(generate(model, [LONG]).sequences, baseline)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mamba"])
def test_acceptance_13_without_a_cache_the_tokens_are_the_same(family: str) -> None:
    model = model_of(family)
    for place in PLACES:
        with steerkit.steer(model, vector_of(family, place)):
            cached = generate(model, [SHORT, LONG]).sequences
            assert torch.equal(generate(model, [SHORT, LONG], use_cache=False).sequences, cached)


def test_a_handwritten_cached_loop_keeps_its_decision() -> None:
    model, vector = model_of("llama"), vector_of("llama")
    for prompt in (SHORT, LONG):
        with gated.as_decided(model, vector, prompt, opens=prompt in OPEN):
            expected = modes.plain_logits(model, [*prompt, 12, 77])
        for cache in (None, DynamicCache(config=model.config)):
            with torch.no_grad(), steerkit.steer(model, vector, prompt_lengths=[len(prompt)]):
                out = model(torch.tensor([prompt]), past_key_values=cache, use_cache=True)
                got = [out.logits[0, -1]]
                for token in (12, 77):
                    out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
                    got.append(out.logits[0, -1])
            assert (torch.stack(got) - expected[-3:]).abs().max() / expected.abs().max() < 1e-5


def test_a_handwritten_loop_that_names_its_logits_is_replayed() -> None:
    """As `generate` does it, so that the prompt's end is known; the decision goes on with the cache."""
    model, vector = model_of("llama"), vector_of("llama")
    for prompt in (SHORT, LONG):
        with gated.as_decided(model, vector, prompt, opens=prompt in OPEN):
            expected = modes.plain_logits(model, [*prompt, 12, 77])
        cache, got = DynamicCache(config=model.config), []
        with torch.no_grad(), steerkit.steer(model, vector):
            for ids in (prompt, [12], [77]):
                out = model(torch.tensor([list(ids)]), past_key_values=cache, use_cache=True, logits_to_keep=1)
                got.append(out.logits[0, -1])
            assert (torch.stack(got) - expected[-3:]).abs().max() / expected.abs().max() < 1e-5
            cache.reset()
            other = SHORT if prompt == LONG else LONG
            first = model(torch.tensor([other]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        with gated.as_decided(model, vector, other, opens=other in OPEN):
            assert (first - modes.plain_logits(model, other)[-1]).abs().max() < 1e-4, "the cache is used for a new text"


@pytest.mark.parametrize("place", PLACES)
def test_a_conversation_goes_on_with_a_decision_of_its_own(place: str) -> None:
    """A second `generate` on the cache of the first: the new prompt's end decides, what is cached keeps what it got."""
    model, vector = model_of("llama"), vector_of("llama", place)
    with steerkit.steer(model, vector):
        first = generate(model, [SHORT])
        longer = torch.cat([first.sequences, torch.tensor([[12, 77, 31]])], dim=1)
        with torch.no_grad():
            out = model.generate(
                longer,
                attention_mask=torch.ones_like(longer),
                past_key_values=copy.deepcopy(first.past_key_values),
                output_logits=True,
                return_dict_in_generate=True,
                **GREEDY,
            )
    read = _read_on(model, vector, longer, first.past_key_values)
    opens = float(score(read[None], vector.tensors["shared/condition"][0])) > float(vector.tensors["shared/threshold"])
    context = steerkit.steer(model, gated.plain_of(vector)) if opens else modes.no_steering()
    with torch.no_grad(), context:
        expected = model.generate(
            longer,
            attention_mask=torch.ones_like(longer),
            past_key_values=copy.deepcopy(first.past_key_values),
            output_logits=True,
            return_dict_in_generate=True,
            **GREEDY,
        )
    assert torch.equal(out.sequences, expected.sequences)
    for one, other in zip(out.logits, expected.logits, strict=True):
        assert (one - other).abs().max() / other.abs().max() < 1e-5


def _read_on(model: Any, vector: Any, ids: Any, cache: Any) -> Any:
    """What the gate reads of new tokens behind a cache, which is left as it is."""
    found: list[Any] = []
    block = model.model.layers[vector.reads[0].layer]
    handle = block.register_forward_hook(
        lambda _module, _args, output: found.append(output[0, -1].clone()), prepend=True
    )
    held = copy.deepcopy(cache)
    with torch.no_grad():
        model(ids[:, held.get_seq_length() :], past_key_values=held, use_cache=True)
    handle.remove()
    return found[0]


def test_a_streaming_thread_is_gated_too() -> None:
    model, vector = model_of("llama"), vector_of("llama")
    found: list[Any] = []
    with steerkit.steer(model, vector):
        expected = generate(model, [SHORT, LONG]).sequences
        worker = threading.Thread(target=lambda: found.append(generate(model, [SHORT, LONG]).sequences))
        worker.start()
        worker.join()
    assert torch.equal(found[0], expected)


def test_a_copy_made_inside_the_context_is_not_gated() -> None:
    model, vector = model_of("llama"), vector_of("llama")
    baseline = generate(model, [SHORT]).sequences
    with steerkit.steer(model, vector):
        twin = copy.deepcopy(model)
        assert not torch.equal(generate(model, [SHORT]).sequences, baseline)
    assert torch.equal(generate(twin, [SHORT]).sequences, baseline)


def test_gradients_flow_through_a_gated_pass() -> None:
    model, vector = build("llama"), vector_of("llama")
    ids, mask = modes.rows_of([[*SHORT, 12, 77], [*LONG, 12, 77]], side="right")
    losses = []
    for one, rows in ((vector, 2), (gated.plain_of(vector), 1)):
        model.zero_grad()
        with steerkit.steer(model, one, prompt_lengths=[6, 9][:rows]):
            logits = model(ids[:rows], attention_mask=mask[:rows], use_cache=False).logits
        logits[0, : len(SHORT) + 2].logsumexp(-1).sum().backward()
        losses.append(model.model.layers[0].mlp.down_proj.weight.grad.clone())
    assert (losses[0] - losses[1]).abs().max() / losses[1].abs().max() < 1e-4


def test_a_pass_that_cannot_tell_the_prompt_s_end_is_refused() -> None:
    model, ids = model_of("llama"), torch.tensor([SHORT])
    for scope in ("response", "all"):
        with steerkit.steer(model, vector_of("llama"), scope=scope), pytest.raises(ScopeError, match="prompt_lengths"):
            model(ids)


def test_chunks_that_would_be_written_before_the_decision_are_refused() -> None:
    model = model_of("llama")
    for place in PLACES:
        with steerkit.steer(model, vector_of("llama", place), scope="all"), pytest.raises(ScopeError, match="chunked"):
            generate(model, [LONG], prefill_chunk_size=4)
        with steerkit.steer(model, vector_of("llama", place), scope="all"):
            generate(model, [LONG])


def test_scope_all_writes_the_prompt_as_well() -> None:
    model, vector = model_of("llama"), vector_of("llama")
    whole = vector.at(scope="all")
    with steerkit.steer(model, gated.plain_of(vector).at(scope="all")):
        expected = generate(model, [SHORT])
    with steerkit.steer(model, whole):
        ran = generate(model, [SHORT, LONG])
    assert torch.equal(ran.sequences[0, len(LONG) :], expected.sequences[0, len(SHORT) :])
    assert torch.equal(ran.sequences[1], generate(model, [SHORT, LONG]).sequences[1])


def test_hidden_states_show_what_was_written() -> None:
    """A replay could give them for its last columns only, so the pass is probed instead."""
    model, vector = model_of("llama"), vector_of("llama")
    with torch.no_grad(), steerkit.steer(model, vector):
        out = generate(model, [SHORT], output_hidden_states=True)
    assert out.hidden_states[0][0].shape[1] == len(SHORT)
    with torch.no_grad(), steerkit.steer(model, gated.plain_of(vector)):
        plain = generate(model, [SHORT], output_hidden_states=True)
    for one, other in zip(out.hidden_states[0], plain.hidden_states[0], strict=True):
        assert (one - other).abs().max() / other.abs().max() < 1e-5


def test_two_gates_and_an_ordinary_vector_act_together() -> None:
    model = model_of("llama")
    late, early = vector_of("llama"), gated_vector(model, read=Site(1), write=Site(2), opens=(LONG,), closes=(SHORT,))
    ordinary = modes.vector_for(model, scope="response", site=Site(0), size=0.0, seed=3)
    with steerkit.steer(model, [ordinary, late, early]):
        ran = generate(model, [SHORT, LONG])
    for row, vector in enumerate((late, early)):
        prompt = (SHORT, LONG)[row]
        with steerkit.steer(model, gated.plain_of(vector)):
            expected = generate(model, [prompt])
        assert torch.equal(ran.sequences[row, 9:], expected.sequences[0, len(prompt) :])


def test_the_same_model_drafts_for_itself() -> None:
    model, vector = model_of("llama"), vector_of("llama")
    with steerkit.steer(model, vector):
        expected = generate(model, [SHORT]).sequences
        drafted = generate(model, [SHORT], assistant_model=model).sequences
    assert torch.equal(drafted, expected)


def test_at_the_neutral_strength_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, vector = model_of("llama"), vector_of("llama")
    monkeypatch.setattr(_gate.Gate, "read", lambda *_: pytest.fail("read"))
    baseline = generate(model, [SHORT]).sequences
    with steerkit.steer(model, vector, 0.0):
        assert torch.equal(generate(model, [SHORT]).sequences, baseline)


def test_a_strength_changed_between_steps_counts_at_once() -> None:
    model, vector = model_of("llama"), vector_of("llama")
    with steerkit.steer(model, vector, 1.0) as steering:

        def change(_ids: Any, scores: Any) -> Any:
            steering.strength = 0.5
            return scores

        changed = generate(model, [SHORT], logits_processor=[change])
    with steerkit.steer(model, gated.plain_of(vector), 1.0) as steering:
        expected = generate(model, [SHORT], logits_processor=[change])
    for one, other in zip(changed.logits, expected.logits, strict=True):
        assert (one - other).abs().max() / other.abs().max() < 1e-5


def test_recording_and_subjects_read_the_gated_model() -> None:
    """A reading stops at its deepest site, so the decision has to come before it."""
    model, vector = model_of("llama"), vector_of("llama")
    found: dict[str, Any] = {}
    ids, mask = modes.rows_of([[*SHORT, 12], [*LONG, 12]], side="right")
    for name, one in (("gated", vector), ("plain", gated.plain_of(vector)), ("baseline", None)):
        context = modes.no_steering() if one is None else steerkit.steer(model, one, prompt_lengths=[6, 9])
        with context, torch.no_grad():
            found[name] = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert (found["gated"][0] - found["plain"][0])[:7].abs().max() < 1e-5
    assert torch.equal(found["gated"][1], found["baseline"][1])
    assert not torch.equal(found["gated"][0], found["baseline"][0])


def test_a_compiled_model_is_refused() -> None:
    torch._dynamo.reset()
    model = build("llama")
    vector = vector_of("llama")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ModelError, match="compiled"):
        steerkit.steer(compiled, vector)
    model.compile(backend="eager")
    with pytest.raises(ModelError, match="compiled"):
        steerkit.steer(model, vector)
    torch._dynamo.reset()


def test_ordinary_methods_get_no_hook_more() -> None:
    model = build("llama")
    with steerkit.steer(model, modes.vector_for(model, scope="response")):
        ordinary = hooks(model)
    with steerkit.steer(model, vector_of("llama")):
        assert hooks(model) > ordinary
    assert ordinary == 5  # two clocks of two hooks, one dispatcher
