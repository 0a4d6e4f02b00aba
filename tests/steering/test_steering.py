"""What `steer` promises: hooks that come and go, rows and vectors that do not disturb each other, every way to run."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import steerkit
from steerkit.errors import ModelError, ScopeError, StrengthError, VectorFileError, VectorMismatchError
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import Tap
from tests.families import FAMILIES, HIDDEN, build
from tests.gated import gated_vector
from tests.modes import LONG, PAD, SHORT, plain_logits, rows_of, vector_for
from tests.tiny_tokenizers import byte_tokenizer

SOME = ("llama", "gpt2", "gemma2", "falcon", "opt", "mamba", "gpt_oss", "llama_peft")
IDS = torch.tensor([LONG])


@functools.cache
def model_of(family: str = "llama") -> Any:
    return build(family)


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that -0.0 and 0.0 differ."""
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(bits(first), bits(second))


def logits_of(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def hook_tables(model: nn.Module) -> list[Any]:
    names = [
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_backward_hooks",
    ]
    return [(name, list(getattr(module, name).items())) for module in model.modules() for name in names]


def direction_of(vector: steerkit.SteeringVector, site: Site) -> Tensor:
    return vector.tensors[f"{site}/direction"]


@contextlib.contextmanager
def added(model: Any, layer: int, values: Tensor) -> Iterator[None]:
    """Add [b, t, d] (or what broadcasts to it) to a block's output with a hook written out by hand."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + values.to(output[0].dtype), *output[1:])
        return output + values.to(output.dtype)

    handle = find_decoder(model).blocks[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def block_outputs(model: Any, layer: int, run: Callable[[], Any]) -> list[Tensor]:
    """What a recorder hook on a block sees, without a copy."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = find_decoder(model).blocks[layer].register_forward_hook(hook)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return seen


def sequence(model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> Tensor:
    ids, mask = rows_of(prompts)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, **options}
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, **settings)


# Zero strength, and what is left behind.


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("strength", [0.0, [0.0, -0.0]])
def test_bug_39_zero_strength_is_the_identity_to_the_bit(family: str, strength: Any) -> None:
    model = model_of(family)
    ids, mask = rows_of([SHORT, LONG])
    clean = logits_of(model, ids, attention_mask=mask)
    vector = vector_for(model, scope="all")
    with steerkit.steer(model, vector, strength):
        assert same_bits(logits_of(model, ids, attention_mask=mask), clean)
    with steerkit.steer(model, vector, 1.0):
        assert not torch.equal(logits_of(model, ids, attention_mask=mask), clean)
    assert same_bits(logits_of(model, ids, attention_mask=mask), clean)


@pytest.mark.parametrize("strength", [0.0, [0.0, 1.0]])
def test_bug_39_negative_zero_survives_neutral_strength(strength: Any) -> None:
    model = model_of()
    blocks = find_decoder(model).blocks
    vector = vector_for(model, scope="all", site=Site(2, "resid_pre"))
    seen: list[Tensor] = []
    handles = [
        blocks[1].register_forward_hook(lambda _m, _a, output: torch.full_like(output, -0.0)),
        blocks[2].register_forward_pre_hook(lambda _m, args: seen.append(args[0])),
    ]
    try:
        with steerkit.steer(model, vector, strength):
            logits_of(model, torch.tensor([LONG, LONG]))
    finally:
        for handle in handles:
            handle.remove()
    assert same_bits(seen[0][0], torch.full_like(seen[0][0], -0.0))


def test_bug_39_neutral_row_beside_a_steered_row() -> None:
    for family in SOME:
        model = model_of(family)
        ids, mask = rows_of([LONG, LONG[::-1]])
        clean = logits_of(model, ids, attention_mask=mask)
        with steerkit.steer(model, vector_for(model, scope="all"), [0.0, 2.0]):
            steered = logits_of(model, ids, attention_mask=mask)
        if family == "gpt_oss":
            # An expert takes the tokens of all rows in one product, whose rounding depends on how many they are: the
            # other row is routed elsewhere, so even without hooks this row's last bits follow it.
            assert (steered[0] - clean[0]).abs().max() < 1e-5, family
        else:
            assert same_bits(steered[0], clean[0]), family
        assert (steered[1] - clean[1]).abs().max() > 1e-3, family


class Boom(Exception):
    """What a user's own code raises."""


@pytest.mark.parametrize("family", ["llama", "falcon", "mamba", "llama_peft"])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["inside", "forward"])
def test_bug_30_nothing_is_left_after_an_error(family: str, error: type[BaseException], place: str) -> None:
    model = model_of(family)
    logits_of(model, output_hidden_states=True)  # transformers' own capture hooks come now and stay
    clean, before = logits_of(model), hook_tables(model)

    def fail(*_args: Any) -> None:
        raise error

    handle = find_decoder(model).blocks[2].register_forward_hook(fail) if place == "forward" else None
    with pytest.raises(error), steerkit.steer(model, [vector_for(model, scope="all")] * 2):
        if place == "forward":
            logits_of(model)
        raise error
    if handle is not None:
        handle.remove()
    assert hook_tables(model) == before
    assert same_bits(logits_of(model), clean)


def test_bug_30_a_bad_vector_in_a_list_touches_nothing() -> None:
    model = model_of()
    good = vector_for(model, scope="all")
    clean, before = logits_of(model), hook_tables(model)
    wrong_width = replace(good, hidden_size=64, tensors={"resid_post.1/direction": torch.ones(64)})
    too_deep = replace(good, sites=(Site(9),), tensors={"resid_post.9/direction": torch.ones(HIDDEN)}, num_layers=12)
    for bad in (wrong_width, too_deep):
        with pytest.raises(VectorMismatchError):
            steerkit.steer(model, [good, bad])
        assert hook_tables(model) == before
    assert same_bits(logits_of(model), clean)


def test_bug_30_all_hooks_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The k-th registration of a hook fails, for every k: nothing stays, and the next attempt is right."""
    model = build("llama")
    logits_of(model, output_hidden_states=True)
    sites = (Site(1), Site(2, "resid_pre"), Site(0, "attn_out"))
    steering = steerkit.steer(model, [vector_for(model, scope="first(3)", site=site) for site in sites])
    clean, before = logits_of(model), hook_tables(model)
    with steering:
        right = logits_of(model)
    failed = 0
    for allowed in range(20):
        left = allowed

        def counting(register: Any) -> Any:
            def register_or_fail(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise Boom
                left -= 1
                return register(*args, **kwargs)

            return register_or_fail

        with monkeypatch.context() as patch:
            for name in ("register_forward_hook", "register_forward_pre_hook"):
                patch.setattr(nn.Module, name, counting(getattr(nn.Module, name)))
            try:
                with steering:
                    pass
            except Boom:
                failed += 1
            else:
                break
        assert hook_tables(model) == before, f"{allowed} hooks were allowed"
        assert same_bits(logits_of(model), clean)
        with steering:
            assert same_bits(logits_of(model), right)
        assert hook_tables(model) == before
    assert failed >= 4  # the clock's and one for each site


@pytest.mark.parametrize("family", SOME)
def test_bug_38_class_state_dict_and_attributes_stay(family: str) -> None:
    model = model_of(family)
    inner = find_decoder(model).model
    blocks = find_decoder(model).blocks

    def facts() -> Any:
        return (
            type(model),
            list(model.state_dict()),
            [sorted(vars(module)) for module in model.modules()],
            [type(module) for module in model.modules()],
            [dir(block) for block in blocks],
        )

    before = facts()
    with steerkit.steer(model, [vector_for(model, scope="all"), vector_for(model, scope="front", site=Site(2))]):
        assert facts() == before
        assert isinstance(inner, type(build.__globals__["FAMILIES"][family]()) if family != "llama_peft" else nn.Module)
        logits_of(model)
        assert facts() == before
    assert facts() == before


def test_bug_38_save_pretrained_inside_writes_clean_weights(tmp_path: Any) -> None:
    model = model_of()
    with steerkit.steer(model, vector_for(model, scope="all")):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert same_bits(logits_of(again), logits_of(model))


@pytest.mark.parametrize("family", ["llama", "falcon", "mamba", "llama_peft"])
def test_bug_38_copies_made_inside_are_not_steered(family: str) -> None:
    model = model_of(family)
    clean, vector = logits_of(model), vector_for(model, scope="all")
    with steerkit.steer(model, vector):
        steered = logits_of(model)
        twin = copy.deepcopy(model)
        assert same_bits(logits_of(twin), clean)
        assert same_bits(logits_of(copy.deepcopy(twin)), clean)
        with steerkit.steer(twin, vector):  # the copy can be steered on its own, beside the original
            assert same_bits(logits_of(twin), steered)
        assert same_bits(logits_of(model), steered)
    assert same_bits(logits_of(twin), clean)


def test_bug_38_modules_can_be_pickled_inside() -> None:
    model = model_of()
    clean, buffer = logits_of(model), io.BytesIO()
    with steerkit.steer(model, vector_for(model, scope="all")):
        torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert same_bits(logits_of(twin), clean)


# Several vectors, contexts, models, threads.


def test_two_vectors_at_one_site_and_at_two() -> None:
    model = model_of()
    first, second = vector_for(model, scope="all"), vector_for(model, scope="all", seed=1)
    elsewhere = vector_for(model, scope="all", site=Site(3), seed=2)
    total = direction_of(first, Site(1)) + direction_of(second, Site(1))
    with added(model, 1, total), added(model, 3, direction_of(elsewhere, Site(3))):
        expected = logits_of(model)
    with steerkit.steer(model, [first, second, elsewhere]) as steering:
        assert steering.sites == (Site(1), Site(1), Site(3))
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def keeping_norm(vector: steerkit.SteeringVector) -> steerkit.SteeringVector:
    return replace(
        vector,
        method="repe",
        edit="add_keep_norm",
        settings={"reading": "pca", "scaling": "difference", "restore_norm": True},
    )


def test_order_at_one_site_is_the_order_of_the_list_and_of_nesting() -> None:
    model = model_of()
    plain, kept = vector_for(model, scope="all"), keeping_norm(vector_for(model, scope="all", seed=1))
    h = block_outputs(model, 1, lambda: logits_of(model))[0]

    def after(vectors: Any) -> Tensor:
        with steerkit.steer(model, vectors):
            return block_outputs(model, 1, lambda: logits_of(model))[0]

    def keep(edited: Tensor, before: Tensor) -> Tensor:
        return edited * (before.norm(dim=-1, keepdim=True) / edited.norm(dim=-1, keepdim=True))

    v, w = direction_of(plain, Site(1)), direction_of(kept, Site(1))
    torch.testing.assert_close(after([plain, kept]), keep(h + v + w, h + v), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after([kept, plain]), keep(h + w, h) + v, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after([plain, kept]), after([kept, plain]), atol=1e-2)
    for outer, inner in ((plain, kept), (kept, plain)):
        listed = after([outer, inner])
        with steerkit.steer(model, outer):
            assert same_bits(after(inner), listed)


def test_reentry_of_one_steering_counts_twice_and_ends_clean() -> None:
    model = model_of()
    vector = vector_for(model, scope="all")
    clean, before = logits_of(model), hook_tables(model)
    steering = steerkit.steer(model, vector, 1.0)
    with steering:
        once = logits_of(model)
        with steering, steerkit.steer(model, [vector, vector]) as doubled:
            assert doubled.strength == 1.0
            four = logits_of(model)
        assert same_bits(logits_of(model), once)
    with steerkit.steer(model, vector, 4.0):
        torch.testing.assert_close(logits_of(model), four, rtol=1e-4, atol=1e-4)
    with steering:  # and once more afterwards
        assert same_bits(logits_of(model), once)
    assert hook_tables(model) == before
    assert same_bits(logits_of(model), clean)


def test_bug_31_two_models_interleaved() -> None:
    one, two = build("llama"), build("llama", seed=1)
    clean = [logits_of(one), logits_of(two)]
    first, second = vector_for(one, scope="response"), vector_for(two, scope="first(2)", seed=1)
    with steerkit.steer(one, first, 2.0):
        alone = sequence(one, [SHORT, LONG])
    with steerkit.steer(two, second, -1.0):
        other = sequence(two, [SHORT, LONG])
    with steerkit.steer(one, first, 2.0):
        with steerkit.steer(two, second, -1.0):
            assert torch.equal(sequence(one, [SHORT, LONG]), alone)
            assert torch.equal(sequence(two, [SHORT, LONG]), other)
            assert torch.equal(sequence(one, [SHORT, LONG]), alone)
        assert same_bits(logits_of(two), clean[1])
        assert torch.equal(sequence(one, [SHORT, LONG]), alone)
    assert same_bits(logits_of(one), clean[0])


def test_bug_31_rows_of_a_batch_are_steered_each() -> None:
    for family in ("llama", "falcon", "opt"):
        model = model_of(family)
        prompts = [LONG, LONG[::-1], tuple(reversed(LONG[:5])) + LONG[:4]]
        ids, mask = rows_of(prompts)
        with steerkit.steer(model, vector_for(model, scope="all")):
            together = logits_of(model, ids, attention_mask=mask)
            alone = [logits_of(model, torch.tensor([prompt]))[0] for prompt in prompts]
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-4)


def run_in_thread(work: Callable[[], Any]) -> Any:
    result: list[Any] = []
    error: list[BaseException] = []

    def target() -> None:
        try:
            result.append(work())
        except BaseException as caught:  # noqa: BLE001 - raised again by the caller's thread
            error.append(caught)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if error:
        raise error[0]
    return result[0]


def test_bug_31_streaming_from_a_worker_thread_is_steered() -> None:
    from transformers import TextIteratorStreamer

    model, tokenizer = model_of(), byte_tokenizer(None)
    ids, mask = rows_of([LONG])
    with steerkit.steer(model, vector_for(model, scope="response")):
        expected = tokenizer.decode(sequence(model, [LONG])[0, len(LONG) :])
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
        options = {"input_ids": ids, "attention_mask": mask, "streamer": streamer, **settings}
        thread = threading.Thread(target=model.generate, kwargs=options)
        thread.start()
        streamed = "".join(streamer)
        thread.join(60)
    assert streamed == expected
    assert expected != tokenizer.decode(sequence(model, [LONG])[0, len(LONG) :])


def test_bug_31_passes_of_two_threads_at_once_keep_their_own_facts() -> None:
    """Both threads stand in block 0 of one model before either goes on."""
    model = model_of()
    barrier = threading.Barrier(2)
    rows = [rows_of([SHORT[:3], LONG]), rows_of([LONG[::-1], SHORT])]  # padded by 6 and 0, by 0 and 3
    results: list[Any] = [None, None]
    with steerkit.steer(model, vector_for(model, scope="first(2)"), 2.0):
        expected = [logits_of(model, ids, attention_mask=mask) for ids, mask in rows]
        handle = find_decoder(model).blocks[0].register_forward_pre_hook(lambda _m, _a: (barrier.wait(30), None)[1])
        workers = [
            threading.Thread(
                target=lambda place=place: results.__setitem__(
                    place, logits_of(model, rows[place][0], attention_mask=rows[place][1])
                )
            )
            for place in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        handle.remove()
    for got, right in zip(results, expected, strict=True):
        assert same_bits(got, right)


def test_bug_31_generates_of_two_threads_at_once() -> None:
    model = model_of()
    prompts = [[SHORT, LONG], [LONG[::-1], SHORT[:4]]]
    results: list[list[Tensor]] = [[], []]
    with steerkit.steer(model, vector_for(model, scope="response"), 2.0):
        expected = [sequence(model, rows) for rows in prompts]

        def work(place: int) -> None:
            for _ in range(3):
                results[place].append(sequence(model, prompts[place]))

        workers = [threading.Thread(target=work, args=(place,)) for place in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
    for got, right in zip(results, expected, strict=True):
        assert len(got) == 3
        assert all(torch.equal(one, right) for one in got)


def in_two_threads(work: Sequence[Callable[[threading.Barrier], Any]]) -> list[Any]:
    """What each of two pieces of work gives, run at once; they may wait for each other."""
    barrier, results = threading.Barrier(2, timeout=60), [None, None]

    def run(place: int) -> None:
        try:
            results[place] = work[place](barrier)
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            barrier.abort()
            results[place] = error  # type: ignore[call-overload]

    workers = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    raised = [one for one in results if isinstance(one, BaseException)]
    for one in sorted(raised, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise one  # what broke the barrier comes first
    return results


def test_bug_31_two_threads_steer_one_model_each_in_its_own_way() -> None:
    """At other sites and the same, passes in between of both; each gives what it gives alone."""
    model = build("llama")
    clean, before = sequence(model, [SHORT, LONG]), hook_tables(model)
    one, other = vector_for(model, scope="response"), vector_for(model, scope="response", seed=1)
    gated = gated_vector(model)
    each: list[Any] = [[one.at(2.0)], [other.at(-1.5), vector_for(model, scope="all", site=Site(2), seed=2).at(1.0)]]
    rows: list[Any] = [[[one.at(1.0)], None], [gated.at(2.0), one.at(0.5, scope="generated")]]
    for pair in (each, rows, [[one.at(2.0)], [one.at(2.0, fade="linear over 2")]]):
        alone = []
        for vectors in pair:
            with steerkit.steer(model, vectors):
                alone.append(sequence(model, [SHORT, LONG]))

        def work(barrier: threading.Barrier, vectors: Any) -> list[Tensor]:
            found = []
            for _ in range(3):
                with steerkit.steer(model, vectors):
                    barrier.wait()
                    found.append(sequence(model, [SHORT, LONG]))
            return found

        got = in_two_threads([functools.partial(work, vectors=vectors) for vectors in pair])
        for place, right in enumerate(alone):
            assert len(got[place]) == 3
            assert all(torch.equal(found, right) for found in got[place])
        assert not torch.equal(alone[0], alone[1])
        assert not any(torch.equal(found, clean) for found in alone)
    assert hook_tables(model) == before
    assert torch.equal(sequence(model, [SHORT, LONG]), clean)


def test_bug_31_one_steering_entered_by_two_threads_counts_once_for_each() -> None:
    model = build("llama")
    steering = steerkit.steer(model, vector_for(model, scope="all"), 2.0)
    with steering:
        right = logits_of(model)

    def work(barrier: threading.Barrier) -> Tensor:
        with steering:
            barrier.wait()
            found = logits_of(model)
            barrier.wait()
            return found

    for found in in_two_threads([work, work]):
        assert same_bits(found, right)


def test_bug_31_a_thread_without_a_context_has_that_of_the_only_one_that_steers() -> None:
    model = build("llama")
    one, other = (steerkit.steer(model, vector_for(model, scope="all", seed=seed)) for seed in range(2))
    clean = logits_of(model)
    with one:
        right = logits_of(model)

    def first(barrier: threading.Barrier) -> None:
        with one:
            barrier.wait()
            assert same_bits(logits_of(model), right)
            with pytest.raises(ModelError, match="2 threads steer this model at once"):
                run_in_thread(lambda: logits_of(model))  # whose would it be?
            barrier.wait()
            barrier.wait()
            assert same_bits(run_in_thread(lambda: logits_of(model)), right)  # the other one has left

    def second(barrier: threading.Barrier) -> None:
        with other:
            barrier.wait()
            barrier.wait()
        barrier.wait()

    in_two_threads([first, second])
    assert same_bits(logits_of(model), clean)


# Rows and strengths.


@pytest.mark.parametrize("family", ["llama", "gemma2", "mamba"])
def test_bug_31_strength_per_row_equals_single_runs(family: str) -> None:
    model, vector = model_of(family), vector_for(model_of(family), scope="response")
    prompts, strengths = [SHORT, LONG, SHORT[:3]], [2.0, 0.0, -1.0]
    alone = []
    for prompt, strength in zip(prompts, strengths, strict=True):
        with steerkit.steer(model, vector, strength):
            alone.append(sequence(model, [prompt])[0, len(prompt) :])
    width = max(map(len, prompts))
    with steerkit.steer(model, vector, strengths):
        together = sequence(model, prompts)[:, width:]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2}])
def test_strength_per_row_under_beams(options: dict[str, int]) -> None:
    model, vector = model_of(), vector_for(model_of(), scope="response")
    prompts, strengths = [SHORT, LONG, SHORT[:3]], torch.tensor([2.0, 0.0, -1.0])
    alone = []
    for prompt, strength in zip(prompts, strengths.tolist(), strict=True):
        with steerkit.steer(model, vector, strength):
            alone.append(sequence(model, [prompt], **options)[:, len(prompt) :])
    with steerkit.steer(model, vector, strengths):
        together = sequence(model, prompts, **options)[:, len(LONG) :]
    assert torch.equal(together, torch.cat(alone))


def test_strength_per_row_with_returned_sequences() -> None:
    """Rows of one item are adjacent: a strength of 0 for the second item leaves exactly its rows alone."""
    model, vector = model_of(), vector_for(model_of(), scope="all")
    options = {"num_return_sequences": 2, "max_new_tokens": 1, "min_new_tokens": 1, "do_sample": True}
    more = {"output_logits": True, "return_dict_in_generate": True}
    clean = sequence(model, [SHORT, LONG], **options, **more).logits[0]
    with steerkit.steer(model, vector, [1.0, 0.0]):
        logits = sequence(model, [SHORT, LONG], **options, **more).logits[0]
    changed = (logits - clean).abs().amax(dim=-1) > 1e-3
    assert changed.tolist() == [True, True, False, False]
    assert same_bits(logits[2:], clean[2:])


@pytest.mark.parametrize("kind", ["resid_post", "resid_pre", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
def test_strength_per_row_in_a_plain_forward(family: str, kind: str) -> None:
    model = model_of(family)
    vector = vector_for(model, scope="response", site=Site(1, kind))
    ids, mask = rows_of([SHORT, LONG], side="right")
    with steerkit.steer(model, vector, (2.0, -1.0), prompt_lengths=[3, 4]):
        together = logits_of(model, ids, attention_mask=mask)
    for row, (prompt, strength, length) in enumerate(((SHORT, 2.0, 3), (LONG, -1.0, 4))):
        with steerkit.steer(model, vector, strength, prompt_lengths=length):
            alone = plain_logits(model, prompt)
        torch.testing.assert_close(together[row, : len(prompt)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_wrong_number_of_strengths_is_an_error(rows: int) -> None:
    model = model_of()
    ids, mask = rows_of([LONG] * rows)
    with steerkit.steer(model, vector_for(model, scope="all"), [1.0, 2.0, 3.0]):
        with pytest.raises(ScopeError, match=f"3 values for a pass of {rows} rows"):
            logits_of(model, ids, attention_mask=mask)
        assert logits_of(model, torch.tensor([LONG] * 3)).shape[0] == 3  # and the next pass is fine


def test_generate_keeps_a_vectors_own_strengths_with_their_prompts() -> None:
    """`steerkit.generate` sorts prompts by length; strengths set with `at` have to follow, or be refused."""
    model, tokenizer = model_of(), byte_tokenizer(None)
    vector = vector_for(model, scope="response")
    prompts, strengths = ["ab", "a much longer prompt", "middle one"], [2.0, 0.0, -2.0]
    alone = [
        steerkit.generate(model, tokenizer, [prompt], vector=vector, strength=strength, max_new_tokens=6)[0]
        for prompt, strength in zip(prompts, strengths, strict=True)
    ]
    assert steerkit.generate(model, tokenizer, prompts, vector=vector, strength=strengths, max_new_tokens=6) == alone
    own = vector.at(strength=strengths)
    try:
        texts = steerkit.generate(model, tokenizer, prompts, vector=own, max_new_tokens=6)
    except StrengthError:
        return
    assert texts == alone


def test_each_of_several_vectors_has_its_own_strength_scope_and_unit() -> None:
    model = model_of()
    plain = vector_for(model, scope="response")
    counted = replace(vector_for(model, scope="response", seed=1), norms={Site(1): 10.0})
    first = plain.at(strength=2.0, scope="all")
    second = counted.at(strength=0.5, scope="first(2)", unit="norm")
    third = vector_for(model, scope="generated", seed=2)
    shift = torch.zeros(1, len(LONG), HIDDEN)
    shift += 2.0 * direction_of(plain, Site(1))
    w = direction_of(counted, Site(1))
    shift[:, :2] += 0.5 * 10.0 * w / w.norm()
    shift[:, 4:] += -1.0 * direction_of(third, Site(1))
    with added(model, 1, shift):
        expected = logits_of(model)
    with steerkit.steer(model, [first, second, third], -1.0, prompt_lengths=4) as steering:
        assert steering.strength == -1.0
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
        steering.strength = 0.0
        assert not torch.allclose(logits_of(model), expected, atol=1e-3)
    with steerkit.steer(model, [first, second]) as fixed:
        assert fixed.strength is None
        with pytest.raises(StrengthError):
            fixed.strength = 2.0


def slow_spread(tokens: Tensor, direction: Tensor) -> float:
    """How far tokens [n, d] spread for a step along a direction, as `steerkit.activations.token_scale` says."""
    deviation = (tokens - tokens.mean(0)).square().mean(0).sqrt()
    common = deviation.square().sum().sqrt()
    own = (len(deviation) / ((direction / direction.norm()) / deviation).square().sum()).sqrt()
    return float((common * own).sqrt())


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_bug_23_a_strength_in_norms_is_the_same_share_of_the_stream_at_every_depth(family: str) -> None:
    model, tokenizer = model_of(family), byte_tokenizer(None)
    texts = ["a first text to read", "another text", "and some more to be read here"]
    data = steerkit.ContrastSet.from_prompts(texts, [text[::-1] for text in texts], raw=True)
    vector = steerkit.fit(model, tokenizer, data, layers="0-3")
    for site in vector.sites:
        one = replace(vector, sites=(site,), tensors={f"{site}/direction": direction_of(vector, site)})
        ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts + [text[::-1] for text in texts]]
        clean = [block_outputs(model, site.layer, lambda row=row: logits_of(model, row))[0][0] for row in ids]
        with steerkit.steer(model, one, 0.5, unit="norm", scope="all"):
            moved = [block_outputs(model, site.layer, lambda row=row: logits_of(model, row))[0][0] for row in ids]
        typical = slow_spread(torch.cat([h[1:] for h in clean]), direction_of(vector, site))
        step = torch.cat([(new - old).norm(dim=-1) for new, old in zip(moved, clean, strict=True)])
        assert ((step / typical - 0.5).abs() < 0.005).all(), site


def test_unit_norm_needs_a_length_and_a_norm() -> None:
    model = model_of()
    vector = vector_for(model, scope="all")
    with pytest.raises(StrengthError, match="norm"):
        steerkit.steer(model, vector, 1.0, unit="norm")
    with pytest.raises(StrengthError, match="length"):
        steerkit.steer(model, keeping_norm(replace(vector, norms={Site(1): 3.0})), 1.0, unit="norm")
    suggested = replace(vector, norms={Site(1): 3.0}, suggested_strength=2.0)
    with pytest.raises(StrengthError, match="give a strength"):
        steerkit.steer(model, suggested, unit="norm")
    with steerkit.steer(model, suggested) as steering:
        assert steering.strength == 2.0


def test_strength_changes_in_place_inside_the_context() -> None:
    model = model_of()
    ids, mask = rows_of([SHORT, LONG])
    vector = vector_for(model, scope="all")

    def expected(strength: Any) -> Tensor:
        with steerkit.steer(model, vector, strength):
            return logits_of(model, ids, attention_mask=mask)

    walk = [1.0, 0.0, 2.5, [1.0, 0.0], [0.0, 3.0], 2, [0.0, 0.0], -1.0]
    right = [expected(strength) for strength in walk]
    with steerkit.steer(model, vector, 0.5) as steering:
        for strength, logits in zip(walk, right, strict=True):
            steering.strength = strength
            assert steering.strength == (tuple(strength) if isinstance(strength, list) else strength)
            assert same_bits(logits_of(model, ids, attention_mask=mask), logits), strength
        with pytest.raises(StrengthError):
            steering.strength = float("nan")
        assert same_bits(logits_of(model, ids, attention_mask=mask), right[-1])  # a refused value changes nothing


@pytest.mark.parametrize(
    "strength",
    [float("nan"), float("inf"), -float("inf"), True, "2", "", [], [1.0, float("nan")], [1.0, True], [[1.0], [2.0]],
     torch.tensor([1.0, float("inf")]), torch.tensor([True]), 10**400, 1e39],
    ids=lambda value: repr(value)[:12],
)  # fmt: skip
def test_strengths_that_are_none(strength: Any) -> None:
    model = model_of()
    with pytest.raises(StrengthError):
        steerkit.steer(model, vector_for(model, scope="all"), strength)


def test_no_vector_is_an_error() -> None:
    missing = ("file.safetensors", "column 1: file.safetensors: no such file")  # a text is a composition
    for none, message in (([], "empty list"), missing, (3, "SteeringVector.load"), ([None], "None")):
        with pytest.raises(VectorFileError, match=message):
            steerkit.steer(model_of(), none)


@pytest.mark.parametrize("unit", ["x", "norms", 3])
def test_an_unknown_unit_is_refused(unit: Any) -> None:
    model = model_of()
    with pytest.raises(StrengthError, match="unknown unit"):
        steerkit.steer(model, vector_for(model, scope="all"), 1.0, unit=unit)


def test_bug_27_a_vector_of_another_shape_is_refused() -> None:
    model = model_of()
    vector = vector_for(model, scope="all")
    for shape in ((), (HIDDEN, 1), (1, 1, HIDDEN), (HIDDEN + 1,), (2 * HIDDEN,)):
        with pytest.raises((VectorFileError, VectorMismatchError), match=r"resid_post\.1") as caught:
            steerkit.steer(model, replace(vector, tensors={"resid_post.1/direction": torch.ones(shape)}))
        assert str(HIDDEN) in str(caught.value)
    rows = replace(vector, tensors={"resid_post.1/direction": torch.ones(3, HIDDEN)})  # a window, but not for CAA
    with pytest.raises((VectorFileError, VectorMismatchError)), steerkit.steer(model, rows):
        logits_of(model, torch.tensor([LONG[:3]]))


# Scopes.


@pytest.mark.parametrize("scope", ["response", "generated", "prompt", "mid", "back"])
def test_scopes_that_need_the_prompts_end_are_refused_without_it(scope: str) -> None:
    model = model_of()
    vector = vector_for(model, scope=scope)
    with steerkit.steer(model, vector), pytest.raises(ScopeError, match="prompt_lengths"):
        logits_of(model)
    with steerkit.steer(model, vector, prompt_lengths=4):
        assert (logits_of(model) - logits_of_clean(model)).abs().max() > 1e-3


def logits_of_clean(model: Any) -> Tensor:
    return logits_of(copy.deepcopy(model))


@pytest.mark.parametrize("scope", ["all", "first(2)", "front"])
def test_scopes_that_need_no_prompt_end_work_in_a_plain_forward(scope: str) -> None:
    model = model_of()
    clean = logits_of(model)
    with steerkit.steer(model, vector_for(model, scope=scope)):
        assert (logits_of(model) - clean).abs().max() > 1e-3


@pytest.mark.parametrize("lengths", [0, -1, True, 2.5, [], [3, 0], [3, 2.0], torch.tensor([2.0]), "3"], ids=str)
def test_prompt_lengths_that_are_none(lengths: Any) -> None:
    model = model_of()
    with pytest.raises(ScopeError, match="prompt_lengths"):
        steerkit.steer(model, vector_for(model, scope="response"), prompt_lengths=lengths)


def test_prompt_lengths_for_another_number_of_rows() -> None:
    model = model_of()
    message = "prompt_lengths: got 2 values for a pass of 3 rows"
    steering = steerkit.steer(model, vector_for(model, scope="response"), prompt_lengths=[3, 4])
    with steering, pytest.raises(ScopeError, match=message):
        logits_of(model, torch.tensor([LONG] * 3))


@pytest.mark.parametrize("scope", ["nonsense", "first", "first(0)", "first(n)", "first(-1)", ""])
def test_scopes_that_are_none(scope: str) -> None:
    model = model_of()
    with pytest.raises(ScopeError):
        steerkit.steer(model, vector_for(model, scope="all"), scope=scope)


def test_a_method_has_its_own_scopes_only() -> None:
    model = model_of()
    for own, asked in (("all", "front"), ("all", "back"), ("front", "all"), ("front", "response"), ("mid", "first(3)")):
        with pytest.raises(ScopeError, match="not one of its own"):
            steerkit.steer(model, vector_for(model, scope=own), scope=asked)


def test_bug_02_packed_rows_allow_scope_all_only() -> None:
    model = model_of()
    ids = torch.tensor([[*LONG, *SHORT]])
    packed = torch.cat([torch.arange(len(LONG)), torch.arange(len(SHORT))])[None]
    for scope in ("first(2)", "response", "prompt", "generated", "front"):
        vector = vector_for(model, scope=scope)
        advice = "are not known$" if scope == "front" else "; use scope='all'$"  # `all` is none of ActAdd's scopes
        with steerkit.steer(model, vector, prompt_lengths=3), pytest.raises(ScopeError, match=advice):
            logits_of(model, ids, position_ids=packed)
        with steerkit.steer(model, vector, prompt_lengths=3):
            logits_of(model, ids, position_ids=torch.arange(ids.shape[1])[None])  # counted through: one text
    vector = vector_for(model, scope="all")
    with added(model, 1, direction_of(vector, Site(1))):
        expected = logits_of(model, ids, position_ids=packed)
    with steerkit.steer(model, vector):
        torch.testing.assert_close(logits_of(model, ids, position_ids=packed), expected, rtol=1e-6, atol=1e-6)


def test_bug_02_continuous_batching_allows_scope_all_only() -> None:
    """Such a pass is known by its keywords; the model below has them and ignores them, as eager attention does not."""
    model = model_of()
    clock_keywords = {"cu_seq_lens_q": torch.tensor([0, 4, 9])}
    steering = steerkit.steer(model, vector_for(model, scope="response"), prompt_lengths=3)
    with steering, pytest.raises(ScopeError, match="continuously"):
        logits_of(model, **clock_keywords)
    vector = vector_for(model, scope="all")
    with added(model, 1, direction_of(vector, Site(1))):
        expected = logits_of(model, **clock_keywords)
    with steerkit.steer(model, vector):
        torch.testing.assert_close(logits_of(model, **clock_keywords), expected, rtol=1e-6, atol=1e-6)


@functools.cache
def prompt_tuned() -> Any:
    from peft import PromptTuningConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # peft says it in every pass
def test_a_prompt_learning_adapter_allows_scope_all_only() -> None:
    model = prompt_tuned()
    for scope in ("response", "first(3)", "prompt", "front"):
        advice = "are not known$" if scope == "front" else "; use scope='all'$"
        with pytest.raises(ScopeError, match=advice):
            steerkit.steer(model, vector_for(model, scope=scope))
    vector = vector_for(model, scope="all")
    clean = sequence(model, [LONG])
    with added(model, 1, direction_of(vector, Site(1))):
        expected = sequence(model, [LONG]), logits_of(model)
    with steerkit.steer(model, vector):
        assert torch.equal(sequence(model, [LONG]), expected[0])
        torch.testing.assert_close(logits_of(model), expected[1], rtol=1e-6, atol=1e-6)
    assert not torch.equal(clean, expected[0])


# Pads, positions, caches.


def padded(side: str) -> tuple[Tensor, Tensor]:
    if side != "both":
        return rows_of([SHORT, LONG, SHORT[:3]], side=side)
    ids, mask = torch.full((3, 14), PAD), torch.zeros(3, 14, dtype=torch.long)
    for row, (start, prompt) in enumerate(((2, SHORT), (4, LONG), (0, SHORT[:3]))):
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    return ids, mask


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize(
    "scope",
    ["all", "response", "prompt", "generated", "first(2)", "front", "back", "mid", "response(2)", "generated(1)"],
)
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_bug_02_exactly_the_real_tokens_of_the_scope_are_written(
    family: str, scope: str, side: str, explicit: bool
) -> None:
    if explicit and family == "mamba":
        pytest.skip("mamba takes no position_ids")
    model = model_of(family)
    ids, mask = padded(side)
    lengths = [4, 6, 3]
    inputs = {"attention_mask": mask}
    if explicit:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    clean = block_outputs(model, 1, lambda: logits_of(model, ids, **inputs))[0]
    with steerkit.steer(model, vector_for(model, scope=scope), prompt_lengths=lengths):
        steered = block_outputs(model, 1, lambda: logits_of(model, ids, **inputs))[0]
    moved = (bits(steered) != bits(clean)).any(dim=-1)
    for row in range(3):
        real = int(mask[row].sum())
        first, prompt = int(mask[row].argmax()), lengths[row]
        chosen = {
            "all": range(real),
            "prompt": range(prompt),
            "response": range(prompt - 1, real),
            "generated": range(prompt, real),
            "first(2)": range(2),
            "response(2)": range(prompt - 1, min(prompt + 1, real)),
            "generated(1)": range(prompt, min(prompt + 1, real)),
            "front": range(3),
            "back": range(prompt - 3, prompt),
            "mid": range(prompt // 2 - 3 // 2, prompt // 2 - 3 // 2 + 3),
        }[scope]
        assert moved[row].nonzero().flatten().tolist() == [first + place for place in chosen if place < real]


def test_bug_02_one_unpadded_row_and_a_batch_without_a_mask() -> None:
    for family in SOME:
        model = model_of(family)
        for rows in (1, 3):
            ids = torch.tensor([LONG] * rows)
            clean = block_outputs(model, 1, functools.partial(logits_of, model, ids))[0]
            with steerkit.steer(model, vector_for(model, scope="all")):
                steered = block_outputs(model, 1, functools.partial(logits_of, model, ids))[0]
            assert ((steered != clean).any(dim=-1)).all(), family


@pytest.mark.parametrize("family", SOME)
def test_right_padded_plain_forward_equals_single(family: str) -> None:
    model = model_of(family)
    ids, mask = rows_of([SHORT, LONG], side="right")
    with steerkit.steer(model, vector_for(model, scope="response"), prompt_lengths=[3, 5]):
        together = logits_of(model, ids, attention_mask=mask)
    for row, (prompt, length) in enumerate(((SHORT, 3), (LONG, 5))):
        with steerkit.steer(model, vector_for(model, scope="response"), prompt_lengths=length):
            alone = plain_logits(model, prompt)
        torch.testing.assert_close(together[row, : len(prompt)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "llama_peft", "gemma3_vlm"])
def test_the_body_called_alone_is_steered_too(family: str) -> None:
    model = model_of(family)
    decoder = find_decoder(model)
    ids, mask = rows_of([SHORT, LONG])
    vector = vector_for(model, scope="first(2)")
    with torch.no_grad(), steerkit.steer(model, vector):
        whole = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        alone = decoder.body(input_ids=ids, attention_mask=mask).last_hidden_state
        positional = decoder.body(ids, attention_mask=mask).last_hidden_state
    with torch.no_grad():
        clean = decoder.body(input_ids=ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(alone[real], whole[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(positional[real], whole[real], rtol=1e-5, atol=1e-5)
    assert (alone[real] - clean[real]).abs().max() > 1e-2


def test_the_body_alone_after_an_interrupted_pass_has_its_own_facts() -> None:
    """torch skips closing hooks for KeyboardInterrupt, so the facts of the broken pass are still noted."""
    model = model_of()
    decoder = find_decoder(model)
    left, right = rows_of([SHORT, LONG], side="left"), rows_of([SHORT, LONG], side="right")
    with torch.no_grad(), steerkit.steer(model, vector_for(model, scope="first(2)")):
        expected = decoder.body(input_ids=right[0], attention_mask=right[1]).last_hidden_state

        def stop(*_args: Any) -> None:
            raise KeyboardInterrupt

        handle = decoder.blocks[2].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=left[0], attention_mask=left[1])
        handle.remove()
        again = decoder.body(input_ids=right[0], attention_mask=right[1]).last_hidden_state
    assert same_bits(again, expected)


def test_a_users_hook_may_run_a_forward_of_its_own() -> None:
    model = model_of()
    blocks = find_decoder(model).blocks
    inner: list[Tensor] = []

    def look_elsewhere(_module: nn.Module, _args: Any) -> None:
        if not inner:
            inner.append(torch.empty(0))
            inner[0] = logits_of(model, torch.tensor([SHORT]))

    with steerkit.steer(model, vector_for(model, scope="first(2)")):
        expected, aside = logits_of(model), logits_of(model, torch.tensor([SHORT]))
        handle = blocks[1].register_forward_pre_hook(look_elsewhere)
        try:
            assert same_bits(logits_of(model), expected)
        finally:
            handle.remove()
    assert same_bits(inner[0], aside)


def test_bug_31_a_generate_inside_a_generate_keeps_its_own_prompt_end() -> None:
    """A logits processor that asks the same model about another text (reranking, guidance)."""
    model = model_of()
    inner: list[Tensor] = []

    def ask(_ids: Tensor, scores: Tensor) -> Tensor:
        if not inner:
            inner.append(torch.empty(0))
            inner[0] = sequence(model, [SHORT])
        return scores

    with steerkit.steer(model, vector_for(model, scope="response")):
        expected, aside = sequence(model, [LONG]), sequence(model, [SHORT])
        assert torch.equal(sequence(model, [LONG], logits_processor=[ask]), expected)
    assert torch.equal(inner[0], aside)


def test_a_block_called_on_its_own_is_refused() -> None:
    model = model_of()
    block = find_decoder(model).blocks[1]
    embeddings = torch.zeros(1, 3, HIDDEN)
    rotary = model.model.rotary_emb(embeddings, torch.arange(3)[None])
    with steerkit.steer(model, vector_for(model, scope="first(2)")), pytest.raises(ScopeError, match="on its own"):
        block(embeddings, position_embeddings=rotary)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize(
    "scope", ["response", "prompt", "generated", "first(7)", "all", "back", "response(2)", "generated(2)"]
)
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_cached_loop_written_by_hand(family: str, scope: str, side: str) -> None:
    model = model_of(family)
    prompts = [LONG] if side == "none" else [SHORT, LONG]
    ids, mask = rows_of(prompts)
    vector = vector_for(model, scope=scope)
    got = []
    with torch.no_grad(), steerkit.steer(model, vector, prompt_lengths=[len(prompt) for prompt in prompts]):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
        answers = []
        for _ in range(4):
            chosen = out.logits[:, -1:].argmax(dim=-1)
            got.append(out.logits[:, -1])
            answers.append(chosen)
            mask = torch.cat([mask, torch.ones_like(chosen)], dim=1)
            out = model(
                input_ids=chosen,
                attention_mask=mask,
                position_ids=mask.cumsum(1)[:, -1:] - 1,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
    for row, prompt in enumerate(prompts):
        text = [*prompt, *(int(answer[row]) for answer in answers)]
        with steerkit.steer(model, vector, prompt_lengths=len(prompt)):
            expected = plain_logits(model, text)[len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack(got)[:, row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_recurrent_loop_written_by_hand(with_mask: bool) -> None:
    """Without a mask nothing in a Mamba pass tells its columns: right, or refused, but never silently unsteered."""
    model = model_of("mamba")
    vector = vector_for(model, scope="response")
    ids = torch.tensor([LONG])

    def mask(width: int) -> dict[str, Tensor]:
        return {"attention_mask": torch.ones(1, width, dtype=torch.long)} if with_mask else {}

    with torch.no_grad(), steerkit.steer(model, vector, prompt_lengths=len(LONG)):
        out = model(input_ids=ids, use_cache=True, **mask(len(LONG)))
        token = out.logits[:, -1:].argmax(dim=-1)
        try:
            out = model(input_ids=token, cache_params=out.cache_params, use_cache=True, **mask(len(LONG) + 1))
        except ScopeError:
            assert not with_mask
            return
        expected = plain_logits(model, [*LONG, int(token)])[-1]
    torch.testing.assert_close(out.logits[0, -1], expected, rtol=1e-4, atol=1e-4)


def written_columns(scope: str, first: int, prompt: int, end: int) -> list[int]:
    """Columns from `first` on that a call writes, its prompt ending at `prompt`, the last pass at `end`."""
    return [
        column
        for column in range(first, end)
        if {"response": column >= prompt - 1, "prompt": column < prompt, "all": True, "generated": column >= prompt}[
            scope
        ]
    ]


@pytest.mark.parametrize("again", ["steered", "clean"])
@pytest.mark.parametrize("given", ["all ids", "new ids"])
@pytest.mark.parametrize("fresh", [1, 12])
@pytest.mark.parametrize("scope", ["response", "prompt"])
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gemma2",
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in sorted({*FAMILIES} - {"llama", "gemma2", "mamba"})
        ),
    ],
)
def test_bug_06_a_cache_continued_by_a_second_generate(
    family: str, scope: str, fresh: int, given: str, again: str
) -> None:
    """Against one plain pass with the vector added by hand where the two calls must have added it."""
    model = model_of(family)
    vector = vector_for(model, scope=scope)
    first_ids = torch.tensor([SHORT])
    common: dict[str, Any] = {"do_sample": False, "pad_token_id": PAD, "return_dict_in_generate": True}
    with torch.no_grad(), steerkit.steer(model, vector):
        first = model.generate(
            input_ids=first_ids, attention_mask=torch.ones_like(first_ids), max_new_tokens=3, min_new_tokens=3, **common
        )
    cached = first.past_key_values.get_seq_length()
    new = torch.tensor([[(37 * place + 12) % 300 for place in range(fresh)]])
    whole = torch.cat([first.sequences, new], dim=1)
    assert cached == whole.shape[1] - fresh - 1
    passed = whole if given == "all ids" else whole[:, cached:]
    context: Any = steerkit.steer(model, vector) if again == "steered" else contextlib.nullcontext()
    with torch.no_grad(), context:
        out = model.generate(
            input_ids=passed,
            attention_mask=torch.ones_like(whole),
            past_key_values=first.past_key_values,
            max_new_tokens=4,
            min_new_tokens=4,
            output_logits=True,
            **common,
        )
    answer = out.sequences[0, passed.shape[1] :].tolist()
    text = [*whole[0].tolist(), *answer]
    shift = torch.zeros(1, len(text), HIDDEN)
    shift[0, written_columns(scope, 0, len(SHORT), cached)] = direction_of(vector, Site(1))
    if again == "steered":
        shift[0, written_columns(scope, cached, whole.shape[1], len(text))] = direction_of(vector, Site(1))
    with added(model, 1, shift):
        expected = plain_logits(model, text)[whole.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1)[0], expected, rtol=1e-4, atol=1e-4)


def test_bug_06_mambas_continued_cache_is_refused() -> None:
    model = model_of("mamba")
    ids = torch.tensor([LONG])
    common: dict[str, Any] = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 3, "min_new_tokens": 3}
    with torch.no_grad(), steerkit.steer(model, vector_for(model, scope="response")):
        first = model.generate(input_ids=ids, return_dict_in_generate=True, **common)
        cache = first.get("cache_params", None)
        cache = first.get("past_key_values", None) if cache is None else cache
        assert cache is not None
        longer = torch.cat([first.sequences, ids], dim=1)
        with pytest.raises(ModelError, match="recurrent cache"):
            model.generate(input_ids=longer, cache_params=cache, **common)
        model.generate(input_ids=longer, **common)


@pytest.mark.parametrize("scope", ["response", "prompt", "first(8)", "back"])
@pytest.mark.parametrize("draft", ["itself", "other"])
def test_bug_06_assisted_decoding_writes_each_position_once(draft: str, scope: str) -> None:
    model = model_of()
    assistant = model if draft == "itself" else build("llama", seed=1)
    vector = vector_for(model, scope=scope)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8}
    with steerkit.steer(model, vector):
        plain = sequence(model, [LONG], **settings)
        out = sequence(
            model, [LONG], assistant_model=assistant, output_logits=True, return_dict_in_generate=True, **settings
        )
    assert torch.equal(out.sequences, plain)
    with steerkit.steer(model, vector, prompt_lengths=len(LONG)):
        expected = plain_logits(model, out.sequences[0].tolist())[len(LONG) - 1 : -1]
    torch.testing.assert_close(torch.cat(out.logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_bug_06_every_position_is_written_once(options: dict[str, Any]) -> None:
    """Counts the vector in the block's output, per row and column, over the passes of one call."""
    model = model_of()
    vector = vector_for(model, scope="response")
    v = direction_of(vector, Site(1))
    shares: list[Tensor] = []
    block = find_decoder(model).blocks[1]
    with steerkit.steer(model, vector):
        # Appended before the dispatcher is asked: reads the block's own output and what it became.
        dispatcher = next(iter(block._forward_hooks.values()))
        handle = block.register_forward_hook(
            lambda module, args, output: shares.append(((output - unsteered[-1]) @ v / (v @ v)).detach()),
        )
        unsteered: list[Tensor] = []
        first = block.register_forward_hook(lambda _m, _a, output: unsteered.append(output), prepend=True)
        sequence(model, [LONG, SHORT], max_new_tokens=4, min_new_tokens=4, **options)
        handle.remove()
        first.remove()
        assert next(iter(block._forward_hooks.values())) is dispatcher
    total, past = torch.zeros(shares[0].shape[0], len(LONG) + 3), 0
    for share in shares:
        if options.get("use_cache", True):
            total[:, past : past + share.shape[1]] += share
            past += share.shape[1]
        else:
            total = torch.zeros_like(total)
            total[:, : share.shape[1]] = share
    expected = torch.zeros_like(total)
    expected[:, len(LONG) - 1 :] = 1.0
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("where", [3, len(SHORT) - 1, len(SHORT) + 1])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "mamba"])
def test_bug_01_positions_do_not_restart_with_each_pass(family: str, where: int) -> None:
    """Steered from an absolute position on: cached generation equals one whole pass."""
    model = model_of(family)
    vector = vector_for(model, scope="generated")
    with steerkit.steer(model, vector, prompt_lengths=where):
        out = sequence(
            model, [SHORT], max_new_tokens=6, min_new_tokens=6, output_logits=True, return_dict_in_generate=True
        )
    text = out.sequences[0].tolist()
    shift = torch.zeros(1, len(text), HIDDEN)
    shift[:, where:] = direction_of(vector, Site(1))
    with added(model, 1, shift):
        expected = plain_logits(model, text)[len(SHORT) - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["first(4)", "front", "mid", "back"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_bug_05_a_row_with_pads_gets_what_it_gets_alone(family: str, scope: str) -> None:
    model = model_of(family)
    vector = vector_for(model, scope=scope)
    with steerkit.steer(model, vector):
        alone = sequence(model, [SHORT[:4]])[0, 4:]
        beside = sequence(model, [LONG, SHORT[:4]])[1, len(LONG) :]
    assert torch.equal(alone, beside)


@pytest.mark.parametrize("negative", [SHORT, LONG[:1]])
@pytest.mark.parametrize("scope", ["response", "all", "prompt"])
def test_classifier_free_guidance(scope: str, negative: Sequence[int]) -> None:
    """Both texts are steered, each from its own prompt end on."""
    model, scale = model_of(), 1.5
    vector = vector_for(model, scope=scope)
    with steerkit.steer(model, vector):
        out = sequence(
            model,
            [LONG],
            guidance_scale=scale,
            negative_prompt_ids=torch.tensor([negative]),
            negative_prompt_attention_mask=torch.ones(1, len(negative), dtype=torch.long),
            output_scores=True,
            return_dict_in_generate=True,
            min_new_tokens=None,
        )
    answer = out.sequences[0, len(LONG) :].tolist()
    behind = []
    for prompt in (LONG, negative):
        with steerkit.steer(model, vector, prompt_lengths=len(prompt)):
            logits = plain_logits(model, [*prompt, *answer])[len(prompt) - 1 : -1]
        behind.append(torch.log_softmax(logits, dim=-1))
    expected = scale * (behind[0] - behind[1]) + behind[1]
    torch.testing.assert_close(torch.stack(out.scores, dim=1)[0], expected, rtol=1e-4, atol=1e-4)


# What others see.


@pytest.mark.parametrize("captured_before", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "opt", "gpt_oss", "mamba"])
def test_bug_32_output_hidden_states_show_the_steered_value(family: str, captured_before: bool) -> None:
    model = build(family)
    if captured_before:
        logits_of(model, output_hidden_states=True)
    vector = vector_for(model, scope="all")
    h = block_outputs(model, 1, lambda: logits_of(model))[0]
    with torch.no_grad(), steerkit.steer(model, vector):
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    expected = h + direction_of(vector, Site(1))
    assert same_bits(states[1 if family == "mamba" else 2], expected)  # Mamba lists no embeddings


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt2"])
def test_bug_33_recorders_see_documented_values_and_nothing_changes_under_them(family: str) -> None:
    """Hooks of others see the steered value whenever they were attached; only a prepended one can see the old one."""
    model = model_of(family)
    block = find_decoder(model).blocks[1]
    vector = vector_for(model, scope="all")
    clean = block_outputs(model, 1, lambda: logits_of(model))[0].clone()
    seen: dict[str, Tensor] = {}

    def recorder(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [block.register_forward_hook(recorder("before"))]
    with steerkit.steer(model, vector):
        handles.append(block.register_forward_hook(recorder("after")))
        handles.append(block.register_forward_hook(recorder("prepended"), prepend=True))
        logits_of(model)
    for handle in handles:
        handle.remove()
    steered = clean + direction_of(vector, Site(1))
    assert same_bits(seen["before"], steered)
    assert same_bits(seen["after"], steered)
    assert same_bits(seen["prepended"], clean)


@pytest.mark.parametrize("restore_norm", [False, True])
@pytest.mark.parametrize("kind", ["resid_post", "resid_pre", "mlp_out"])
def test_bug_33_gradients_match_finite_differences(kind: str, restore_norm: bool) -> None:
    model = build("gpt2").double()  # Llama-likes compute their norms in float32
    vector = vector_for(model, scope="response", site=Site(1, kind))
    vector = keeping_norm(vector) if restore_norm else vector
    with torch.no_grad():
        embeds = model.get_input_embeddings()(torch.tensor([LONG]))
    way = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    way = way / way.norm()

    def value(point: Tensor) -> Tensor:
        return torch.log_softmax(model(inputs_embeds=point).logits[0, -1], dim=-1)[7]

    with steerkit.steer(model, vector, prompt_lengths=4):
        point = embeds.clone().requires_grad_()
        value(point).backward()
        assert point.grad is not None
        along = float((point.grad * way).sum())
        step = 1e-5
        with torch.no_grad():
            slope = float(value(embeds + step * way) - value(embeds - step * way)) / (2 * step)
    assert abs(along - slope) < 1e-6 * max(1.0, abs(slope))


def gradients(model: Any, run: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    run().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def loss_of(model: Any) -> Tensor:
    ids, mask = rows_of([LONG, LONG[::-1]])
    return model(input_ids=ids, attention_mask=mask, labels=ids).loss


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_bug_33_weight_gradients_equal_those_of_an_addition_by_hand(family: str) -> None:
    model = build(family)
    vector = vector_for(model, scope="all")
    with added(model, 1, direction_of(vector, Site(1))):
        expected = gradients(model, lambda: loss_of(model))
    with steerkit.steer(model, vector):
        got = gradients(model, lambda: loss_of(model))
    assert len(got) == len(expected) > 10
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def checkpointing(model: Any, **options: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **options})


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["resid_post", "resid_pre"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bug_33_gradient_checkpointing_changes_nothing(family: str, kind: str, reentrant: bool) -> None:
    model = build(family).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    vector = vector_for(model, scope="response", site=Site(1, kind))
    with steerkit.steer(model, vector, prompt_lengths=4):
        expected = gradients(model, lambda: loss_of(model))
    checkpointing(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    with steerkit.steer(model, vector, prompt_lengths=4):
        loss = loss_of(model)
    model.zero_grad()
    loss.backward()  # after the context, as a training loop may
    got = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_bug_33_a_site_inside_a_checkpointed_block_is_refused() -> None:
    model = build("llama").train()
    checkpointing(model)
    vector = vector_for(model, scope="all", site=Site(1, "mlp_out"))
    with steerkit.steer(model, vector):
        with pytest.raises(ScopeError, match="checkpointing"):
            loss_of(model)
        (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
        loss_of(model).backward()
        checkpointing(model)
        model.eval()
        assert torch.isfinite(loss_of(model))  # nothing is checkpointed in evaluation


# Dtypes and shapes.


def any_vector(model: Any, method: str) -> steerkit.SteeringVector:
    vector = vector_for(model, scope="front" if method == "actadd" else "all")
    return keeping_norm(vector) if method == "repe" else vector


@pytest.mark.parametrize("method", ["caa", "repe", "actadd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mamba"])
def test_bug_34_dtypes(family: str, dtype: torch.dtype, method: str) -> None:
    model = build(family).to(dtype)
    vector = any_vector(model, method)
    clean = block_outputs(model, 1, lambda: logits_of(model))[0]
    with steerkit.steer(model, vector, 1.5):
        steered = block_outputs(model, 1, lambda: logits_of(model))[0]
        answer = sequence(model, [SHORT, LONG])
    assert answer.shape == (2, len(LONG) + 5)
    assert steered.dtype == clean.dtype == (torch.float32 if family == "mamba" else dtype)
    v = (1.5 * direction_of(vector, Site(1))).to(clean.dtype)
    if method == "caa":
        assert same_bits(steered, clean + v)
    elif method == "actadd":
        assert same_bits(steered[:, :3], clean[:, :3] + v)
        assert same_bits(steered[:, 3:], clean[:, 3:])
    else:
        before, after = clean.float().norm(dim=-1), steered.float().norm(dim=-1)
        torch.testing.assert_close(after, before, rtol=2e-3 if dtype != torch.float32 else 1e-5, atol=0)
        exact = clean.float() + 1.5 * direction_of(vector, Site(1))
        cosine = torch.cosine_similarity(steered.float(), exact, dim=-1)
        assert (cosine > 1 - 1e-4).all()


def test_bug_34_autocast() -> None:
    model = model_of()
    for kind in ("resid_post", "mlp_out"):
        vector = vector_for(model, scope="all", site=Site(1, kind))
        modules = {"resid_post": find_decoder(model).blocks[1], "mlp_out": find_decoder(model).blocks[1].mlp}
        v = direction_of(vector, Site(1, kind))
        with torch.autocast("cpu", torch.bfloat16):
            handle = modules[kind].register_forward_hook(lambda _m, _a, out, v=v: out + v.to(out.dtype))
            expected = logits_of(model)
            handle.remove()
            with steerkit.steer(model, vector):
                got = logits_of(model)
        assert same_bits(got, expected)
        with steerkit.steer(model, vector), torch.autocast("cpu", torch.bfloat16):
            assert same_bits(logits_of(model), expected)


def test_inference_mode_first_and_training_afterwards() -> None:
    model = build("llama")
    vector = vector_for(model, scope="response")
    with steerkit.steer(model, vector, [1.0, 0.0], prompt_lengths=[4, 5]) as steering:
        expected = gradients(model, lambda: loss_of(model))
    with torch.inference_mode(), steerkit.steer(model, vector, [1.0, 0.0], prompt_lengths=[4, 5]):
        loss_of(model)
    with steerkit.steer(model, vector, [1.0, 0.0], prompt_lengths=[4, 5]) as steering:
        with torch.inference_mode():
            loss_of(model)
            steering.strength = [2.0, 1.0]
            steering.strength = [1.0, 0.0]
        for one, other in zip(gradients(model, lambda: loss_of(model)), expected, strict=True):
            assert same_bits(one, other)


class Pair(tuple):
    """A tuple type that must survive."""

    __slots__ = ()

    def __new__(cls, values: Any) -> Pair:
        return super().__new__(cls, values)


def test_bug_35_outputs_keep_their_type() -> None:
    tap = Tap(Site(0), nn.Identity(), "block", "output", flat=False, width=4)
    old, new = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
    shown = BaseModelOutput(last_hidden_state=old, attentions=(old,))
    for output in (old, (old, "rest"), (old,), [old, 1], Pair((old, "rest")), shown, {"hidden": old, "rest": 3}):
        assert tap.read((), {}, output) is old
        changed = tap.write_output(output, new)
        assert type(changed) is type(output)
        assert tap.read((), {}, changed) is new
        assert tap.read((), {}, output) is old  # what was given is left alone
    kept = tap.write_output(shown, new)
    assert kept.attentions is shown.attentions
    assert kept.last_hidden_state is kept[0] is new


@pytest.mark.parametrize("wrap", [lambda h: (h, None), lambda h: [h, None]], ids=["tuple", "list"])
def test_bug_35_blocks_that_give_tuples(wrap: Any) -> None:
    """A llama whose block 1 gives a tuple to the hooks, and a tensor to the body behind them."""
    model = build("llama")
    block = find_decoder(model).blocks[1]
    vector = vector_for(model, scope="all")
    with steerkit.steer(model, vector):
        expected = logits_of(model)
    block.register_forward_hook(lambda _m, _a, output: output[0] if isinstance(output, tuple | list) else output)
    original = block.forward
    block.forward = lambda *args, **kwargs: wrap(original(*args, **kwargs))
    with steerkit.steer(model, vector):
        assert same_bits(logits_of(model), expected)


def test_bug_36_every_option_of_steer_changes_what_comes_out() -> None:
    model = model_of()
    vector = replace(vector_for(model, scope="all"), norms={Site(1): 7.0})
    runs: list[dict[str, Any]] = [{}, {"strength": 2.0}, {"scope": "first(2)"}, {"strength": 1.0, "unit": "norm"}]
    runs += [{"scope": "response", "prompt_lengths": length} for length in (3, 5)]
    results = []
    for options in runs:
        with steerkit.steer(model, vector, **options):
            results.append(logits_of(model))
    for index, one in enumerate(results):
        for other in results[:index]:
            assert (one - other).abs().max() > 1e-4


# Users' ways to run a model.


def test_pipeline() -> None:
    from transformers import pipeline

    model, tokenizer = build("llama"), byte_tokenizer(None)
    tokenizer.pad_token = tokenizer.eos_token
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["a short one", "a prompt of another length"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_full_text": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers says about its own generation settings
        clean = [out[0]["generated_text"] for out in pipe(prompts, batch_size=2, **settings)]
        with steerkit.steer(model, vector_for(model, scope="response")):
            steered = [out[0]["generated_text"] for out in pipe(prompts, batch_size=2, **settings)]
            alone = [pipe(prompt, **settings)[0]["generated_text"] for prompt in prompts]
        after = [out[0]["generated_text"] for out in pipe(prompts, batch_size=2, **settings)]
    assert pipe.model is model
    assert steered == alone
    assert steered != clean == after


def test_trainer_trains_the_steered_model(tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    def train(context: Callable[[Any], Any]) -> tuple[Any, float]:
        model = build("llama")
        rows = [{"input_ids": list(LONG), "labels": list(LONG)}] * 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=1,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                seed=0,
            )
            trainer = Trainer(model=model, args=arguments, train_dataset=rows)
            with context(model):
                loss = trainer.train().training_loss
        return model, loss

    vector = vector_for(model_of(), scope="all")
    steered, loss = train(lambda model: steerkit.steer(model, vector))
    by_hand, expected = train(lambda model: added(model, 1, direction_of(vector, Site(1))))
    assert abs(loss - expected) < 1e-5
    for one, other in zip(steered.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    untrained = build("llama")
    assert any(
        not torch.equal(one, other) for one, other in zip(steered.parameters(), untrained.parameters(), strict=True)
    )


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_offloaded_models_are_steered_alike(family: str, how: str, tmp_path: Any) -> None:
    import accelerate

    here, away = build(family), build(family)
    if how == "cpu":
        accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(away, str(tmp_path), execution_device=torch.device("cpu"))
    block = find_decoder(away).blocks[1]
    assert all(parameter.is_meta for parameter in block.parameters())
    sites = (Site(1), Site(2, "mlp_out"))
    vectors = [vector_for(here, scope="response", site=site) for site in sites]
    with steerkit.steer(here, vectors):
        expected = sequence(here, [SHORT, LONG])
    with steerkit.steer(here, vectors, prompt_lengths=4):
        logits = logits_of(here)
    with steerkit.steer(away, vectors):
        assert torch.equal(sequence(away, [SHORT, LONG]), expected)
    with steerkit.steer(away, vectors, prompt_lengths=4):
        assert same_bits(logits_of(away), logits)
    assert same_bits(logits_of(away), logits_of(here))
