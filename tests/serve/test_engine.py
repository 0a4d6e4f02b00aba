"""Requests that run together get what each of them gets alone, and the engine is left as it was found."""

from __future__ import annotations

import gc
import threading
import time
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

import steerkit
from steerkit.errors import DataError, ModelError, SteerError
from steerkit.maths.directions import unit
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.serve import Catalogue, Done, Engine, Piece, QueueFullError, Request
from steerkit.serve.prefixes import Prefixes
from steerkit.steering import planning
from tests.modes import vector_for
from tests.serve.asked import (
    STEERINGS,
    TOKENIZER,
    alone,
    catalogue,
    chat,
    drawn_alone,
    engine_of,
    ids_of,
    model_of,
    request,
    together,
    vectors_of,
)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bloom"])
def test_sixteen_at_once_get_their_own_tokens(family: str) -> None:
    asked = [request(number) for number in range(16)]
    with engine_of(family) as engine:
        assert engine.worker.joins
        answers = together(engine, asked)
        passes = engine.worker.passes
        assert passes.count < sum(len(one[0].tokens) for one in answers)  # they did share passes
    for one, (answer,) in zip(asked, answers, strict=True):
        assert ids_of(answer) == alone(family, one), one
        assert answer.done is not None
        assert answer.done.finish in ("length", "stop")


def test_seeds_draw_the_same_in_any_company() -> None:
    asked = [request(number, temperature=0.7 + 0.1 * (number % 4), seed=number) for number in range(16)]
    with engine_of() as engine:
        first = together(engine, asked)
        second = together(engine, asked[::-1])[::-1]
        cut = Request(chat("Hi"), temperature=1.3, top_p=0.8, top_k=20, seed=5, max_tokens=12)
        several = Request(chat("Hi"), temperature=1.3, top_p=0.8, top_k=20, seed=4, n=3, max_tokens=12)
        (one,), three = engine.answers(cut), engine.answers(several)
    for question, (answer,), (again,) in zip(asked, first, second, strict=True):
        assert answer.text == again.text == drawn_alone("llama", question)
    assert ids_of(three[1]) == ids_of(one)
    assert len({tuple(ids_of(answer)) for answer in three}) == 3


@pytest.mark.parametrize("family", ["mamba", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_models_that_are_more_than_attention_are_served_apart(family: str) -> None:
    with pytest.warns(UserWarning, match="share no pass"):
        engine = engine_of(family)
    with engine:
        asked = [request(number) for number in range(len(STEERINGS)) if number not in (9, 10, 11)]
        answers = together(engine, asked)
        (compared,) = engine.answers(Request(chat("Hi"), steering="a*1.5", kl=True, max_tokens=4))
    for one, (answer,) in zip(asked, answers, strict=True):
        assert ids_of(answer) == alone(family, one), one
    assert all(token.kl is not None and token.kl > 0 for token in compared.tokens)


def test_texts_longer_than_a_sliding_window() -> None:
    family = "gemma3_text"
    window = model_of(family).config.sliding_window
    asked = [
        Request("The sea is wide. " * (1 + 2 * number), steering=STEERINGS[number], max_tokens=window + number)
        for number in range(4)
    ]
    with engine_of(family, max_tokens=200) as engine:
        answers = together(engine, asked)
        again = together(engine, asked)  # from what is kept
    for one, (answer,), (later,) in zip(asked, answers, again, strict=True):
        assert ids_of(answer) == ids_of(later) == alone(family, one), one


def test_gates_decide_for_their_own_rows() -> None:
    asked = [Request(chat("Hi"), steering=steering, max_tokens=6) for steering in ("gated*2", "a*1.5", None)]
    asked.append(Request(chat("Why?"), steering="gated*2 + b", max_tokens=7))
    with engine_of() as engine:
        answers = together(engine, asked)
        (compared,) = engine.answers(Request(chat("Hi"), steering="gated*2", kl=True, max_tokens=6))
    for one, (answer,) in zip(asked, answers, strict=True):
        assert ids_of(answer) == alone("llama", one), one
    assert ids_of(compared) == ids_of(answers[0][0])


def test_windows_of_prompts_are_each_row_s_own() -> None:
    windows = [vector_for(model_of(), scope=scope, seed=seed) for seed, scope in enumerate(("front", "mid", "back"))]
    asked = [
        Request(chat(text), steering=[one.at(2.0), vectors_of()["a"]], max_tokens=6)
        for one in windows
        for text in ("Hi", "How was your day?")
    ]
    with engine_of() as engine:
        answers = together(engine, [*asked, request(0)])
        again = together(engine, asked)  # nothing is gone on from
        with pytest.raises(DataError, match="writes the first 3"):
            engine.answers(Request([5, 6], steering=windows[:1]))
    for one, (answer,), (later,) in zip(asked, answers, again, strict=False):
        assert ids_of(answer) == ids_of(later) == alone("llama", one), one


def test_an_answer_of_several_prompts_is_read_once() -> None:
    with engine_of() as engine:
        before = engine.worker.passes.tokens
        answers = engine.answers(Request(chat("How was your day?"), steering="a*1.5", n=4, max_tokens=1))
        read = engine.worker.passes.tokens - before
    assert len({tuple(ids_of(answer)) for answer in answers}) == 1
    assert answers[0].done is not None
    assert read == answers[0].done.prompt_tokens


def test_log_probabilities_and_divergences_are_those_of_plain_passes() -> None:
    model, vectors = model_of(), vectors_of()
    asked = Request(chat("How was your day?"), steering="a*1.5", max_tokens=5, logprobs=3, kl=True, probe="b")
    with engine_of() as engine:
        (answer,), *_ = together(engine, [asked, request(3), request(4)])
    prompt = steerkit.serve.prompt.PromptReader(TOKENIZER, 320).ids(asked, [])
    ids = torch.tensor([[*prompt, *ids_of(answer)]])
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        plain = log_softmax(model(ids).logits[0].double(), dim=-1)
        with steerkit.steer(model, vectors["a"].at(1.5), prompt_lengths=len(prompt)):
            block = find_decoder(model).blocks[1]
            handle = block.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if type(out) is tuple else out))
            steered = log_softmax(model(ids).logits[0].double(), dim=-1)
            handle.remove()
    direction = unit(vectors["b"].params(Site(1))["direction"])
    neutral = steerkit.with_neutral(model, TOKENIZER, vectors["b"]).neutral["response_mean"]
    mean, deviation = (neutral["sites"][str(Site(1))][name] for name in ("mean", "deviation"))
    for place, token in enumerate(answer.tokens, start=len(prompt) - 1):
        assert token.logprob == pytest.approx(float(steered[place, token.id]), abs=1e-4)
        assert [one for one, _ in token.top] == steered[place].topk(3).indices.tolist()
        kl = float((steered[place].exp() * (steered[place] - plain[place])).sum())
        assert token.kl == pytest.approx(kl, abs=1e-4)
        along = float(seen[0][0, place] @ direction)
        assert token.reading == pytest.approx((along - mean) / deviation / neutral["joint"], rel=1e-3, abs=1e-3)


def test_each_vector_is_planned_once_and_rows_that_stay_are_entered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    located: list[Any] = []
    plain = planning.locate
    monkeypatch.setattr(planning, "locate", lambda *given: located.append(given) or plain(*given))
    with engine_of() as engine:
        for _ in range(3):
            together(
                engine, [Request(chat("Hi"), steering=f"{name}*{n}", max_tokens=8) for name in "abc" for n in (1, 2)]
            )
        assert engine.worker.passes.plans.count == len(located) == 3
        before = engine.worker.passes.entered
        engine.answers(Request(chat("Hi"), steering="a*3", max_tokens=20))
        assert engine.worker.passes.entered - before <= 2


# What a longer prompt would be steered in otherwise is never gone on from.
@pytest.mark.parametrize("steering", [*STEERINGS, "gated*2"])
def test_a_second_turn_goes_on_from_the_first_and_changes_nothing(steering: str | None) -> None:
    first = Request(chat("Tell me of the sea."), steering=steering, max_tokens=6)
    with engine_of() as engine, engine_of(prefix_bytes=0) as fresh:
        (answer,) = engine.answers(first)
        turns = [*chat("Tell me of the sea."), {"role": "assistant", "content": answer.text}, *chat("And now?")]
        second = Request(turns, steering=steering, max_tokens=6)
        (kept,), (anew,) = engine.answers(second), fresh.answers(second)
        other = Request(turns, steering="c*-2", max_tokens=6)
        (of_another,) = engine.answers(other)
    assert ids_of(kept) == ids_of(anew) == alone("llama", second)
    assert kept.done is not None
    assert of_another.done is not None
    assert anew.done is not None
    is_gated = steering is not None and ("gated" in steering or "when(" in steering)
    assert (kept.done.cached_tokens > 0) == (not is_gated)
    assert anew.done.cached_tokens == 0
    assert of_another.done.cached_tokens == 0
    assert ids_of(of_another) == alone("llama", other)


def test_what_is_kept_has_a_budget() -> None:
    with engine_of(prefix_bytes=20_000) as engine:
        prefixes = engine.worker.prefixes
        for number in range(12):
            engine.answers(Request(f"Number {number} of many texts", max_tokens=4))
            assert prefixes.used <= 20_000
        assert 0 < len(prefixes) < 12


def test_room_is_made_before_more_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks from another thread never sees more than the budget."""
    seen: list[int] = []
    drop = Prefixes._drop

    def noting(self: Prefixes, key: Any) -> None:
        seen.append(self.used)
        drop(self, key)

    monkeypatch.setattr(Prefixes, "_drop", noting)
    with engine_of(prefix_bytes=20_000) as engine:
        for number in range(12):
            engine.answers(Request(f"Number {number} of many texts", max_tokens=4))
    assert seen
    assert max(seen) <= 20_000


def test_stop_texts_end_an_answer_before_them() -> None:
    with engine_of() as engine:
        (whole,) = engine.answers(Request(chat("Hi"), max_tokens=20))
        stop = whole.text[5:7]
        (cut,) = engine.answers(Request(chat("Hi"), max_tokens=20, stop=(stop, "never there")))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.done is not None
    assert cut.done.finish == "stop"


def events_of(engine: Engine, asked: Request) -> tuple[Any, SimpleQueue[Any]]:
    found: SimpleQueue[Any] = SimpleQueue()
    (ticket,) = engine.submit((asked, found.put))
    return ticket, found


def test_a_cancelled_row_goes_at_once_and_the_others_stay() -> None:
    with engine_of(max_tokens=60) as engine:
        ticket, found = events_of(engine, request(0, max_tokens=60))
        other = Request(chat("Why?"), steering="b@all*0.7", max_tokens=40)
        waiting: list[Any] = []
        thread = threading.Thread(target=lambda: waiting.append(engine.answers(other)))
        thread.start()
        assert isinstance(found.get(timeout=20), Piece)
        engine.cancel(ticket)
        while not isinstance(event := found.get(timeout=20), Done):
            pass
        thread.join(30)
        assert event.finish == "cancelled"
        assert ids_of(waiting[0][0]) == alone("llama", other)
        assert engine.running == engine.waiting == 0


def test_a_full_queue_refuses_and_goes_on() -> None:
    with engine_of(max_batch=1, max_queue=2) as engine:
        _, first = events_of(engine, request(0, max_tokens=60))
        first.get(timeout=20)
        taken = [events_of(engine, request(number)) for number in (1, 2)]
        with pytest.raises(QueueFullError, match="2 answers wait already, of at most 2"):
            events_of(engine, request(3))
        for _, found in taken:
            while not isinstance(event := found.get(timeout=20), Done):
                pass
            assert event.finish != "cancelled"
        assert ids_of(engine.answers(request(3))[0]) == alone("llama", request(3))


def test_lengths_are_limited() -> None:
    with engine_of(max_tokens=10) as engine:
        assert engine.context is not None
        (answer,) = engine.answers(Request(chat("Hi")))
        assert answer.done is not None
        assert answer.done.tokens <= 10
        with pytest.raises(DataError, match="at most 10"):
            engine.answers(Request(chat("Hi"), max_tokens=11))
        with pytest.raises(DataError, match="the model takes"):
            engine.answers(Request("x" * (engine.context + 1)))
        with pytest.raises(DataError, match="17 answers take 17 rows"):
            engine.answers(Request(chat("Hi"), n=17))


WRONG = {
    "unknown vector": Request(chat("Hi"), steering="nobody*1"),
    "unknown scope": Request(chat("Hi"), steering="a@front*1"),
    "give ids from 0": Request([1, 2, 10**6]),
    "the prompt is empty": Request([]),
    "unknown vector 'x'": Request(chat("Hi"), probe="x"),
}


def test_what_is_wrong_with_a_request_is_its_own_error() -> None:
    with engine_of() as engine:
        good = request(2, max_tokens=30)
        running: list[Any] = []
        thread = threading.Thread(target=lambda: running.append(engine.answers(good)))
        thread.start()
        for text, wrong in WRONG.items():
            with pytest.raises(SteerError, match="not one of its own" if text == "unknown scope" else text):
                engine.answers(wrong)
        thread.join(30)
        assert ids_of(running[0][0]) == alone("llama", good)


def test_a_strength_beyond_all_numbers_ends_its_own_row_alone() -> None:
    with engine_of() as engine:
        huge = Request(chat("Hi"), steering="a*1e38 + b*1e38 + c*3e38", max_tokens=5)
        (bad,), (good,) = together(engine, [huge, request(0)])
    assert bad.done is not None
    assert bad.done.finish == "error"
    assert "not finite" in str(bad.done.error)
    assert ids_of(good) == alone("llama", request(0))


def test_a_pass_that_fails_ends_no_other_request() -> None:
    model = model_of()
    calls = []

    def fail(_module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"]
        calls.append(ids.shape)
        if (ids == 299).any():
            raise MemoryError

    with engine_of() as engine:
        handle = model.register_forward_pre_hook(fail, with_kwargs=True)
        try:
            bad, good = Request([5, 299, 7], max_tokens=4), Request([5, 6, 7, 8], max_tokens=4, steering="a")
            (failed,), (answer,) = together(engine, [bad, good])
            assert failed.done is not None
            assert failed.done.error == "the pass failed (MemoryError)"
            assert ids_of(answer) == alone("llama", good)
        finally:
            handle.remove()


def test_a_step_that_fails_is_taken_again() -> None:
    """Half of a cache has grown when it fails; every row goes on as if nothing had been, or ends alone."""
    failures = []

    def fail(_module: Any, args: Any) -> None:
        hidden = args[0]
        if hidden.shape[1] == 1 and len(hidden) > 3 and len(failures) < 3:
            failures.append(len(hidden))
            raise MemoryError

    asked = [request(number, max_tokens=8) for number in range(12)]
    with engine_of() as engine:
        handle = find_decoder(model_of()).blocks[2].register_forward_pre_hook(fail)
        answers = together(engine, asked)
        handle.remove()
    assert len(failures) == 3
    for one, (answer,) in zip(asked, answers, strict=True):
        assert ids_of(answer) == alone("llama", one), one


def test_closing_ends_all_and_leaves_the_model_as_it_was() -> None:
    model = model_of("gpt2")
    before = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())
    engine = engine_of("gpt2", max_batch=2, max_tokens=60)
    taken = [events_of(engine, Request(chat("Hi"), steering="a*1.5", max_tokens=60)) for _ in range(4)]
    taken[0][1].get(timeout=20)
    engine.close()
    for ticket, found in taken:
        if ticket.planned.exception(timeout=5) is None:
            while not isinstance(event := found.get(timeout=5), Done):
                pass
            assert event.finish == "cancelled"
    with pytest.raises(ModelError, match="the engine is closed"):
        engine.answers(request(0))
    engine.close()
    after = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())
    assert before == after
    assert not engine.is_alive


def test_a_model_that_cannot_be_steered_is_refused() -> None:
    with pytest.raises(SteerError):
        Engine(torch.nn.Linear(2, 2), TOKENIZER)


def test_names_of_requests_are_no_paths(tmp_path: Any) -> None:
    path = vector_for(model_of(), scope="all").save(tmp_path / "mine.safetensors")
    for name in (f'"{path}"', "../mine", "optimism-caa"):
        with pytest.raises(SteerError, match="unknown vector"):
            catalogue().vectors(f"{name}*1.5")
    allowed = Catalogue(allowed=[str(path)])
    assert allowed.names == ["mine"]
    assert allowed.vectors("mine*2")[0].strength == 2.0
    assert "optimism-caa" in Catalogue(model="smollm2-135m").names


def test_memory_is_flat_afterwards() -> None:
    with engine_of(prefix_bytes=0) as engine:
        together(engine, [request(number) for number in range(16)])
        while engine.running:
            time.sleep(0.01)
        gc.collect()
        before = sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
        for _ in range(3):
            together(engine, [request(number) for number in range(16)])
        while engine.running:
            time.sleep(0.01)
        gc.collect()
        after = sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
    assert after <= before + 20
