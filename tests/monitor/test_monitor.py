"""The monitor: what it reads, what it counts in, and reading while the model generates."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.activations.recording import record_ids
from steerkit.errors import DataError, ModelError, ScopeError, SiteError, VectorMismatchError
from steerkit.evaluate.intervals import NotScored, correlation, separability
from steerkit.methods._registry import method_of
from steerkit.monitor.difference import own_answers, projection_difference
from steerkit.monitor.items import conversation_of
from steerkit.monitor.monitor import Monitor
from steerkit.monitor.shift import finetuning_shift, with_adapter
from steerkit.monitor.watched import Watched
from steerkit.monitor.watched_call import Step
from steerkit.network.sites import Site
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.neutral import neutral_texts
from steerkit.prompts.rendering import render
from steerkit.vector.steering_vector import SteeringVector
from tests.choices import mostly_slow
from tests.families import build
from tests.modes import LONG, PAD, SHORT, rows_of, vector_for
from tests.tiny_tokenizers import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer()
THINKS = byte_tokenizer(CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"))
PROMPTS = ["How are you?", "Tell me of the sea, please.", "Why?"]
ANSWERED = [
    {"prompt": "How are you?", "response": "Fine, thank you."},
    {"prompt": "Why?", "response": "Because it is so, and it was so before."},
    {"messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "No."}]},
]
NEUTRAL = [
    Conversation("Two and two?", answer="4 it is"),
    Conversation("Name a colour, please.", answer="Blue is one, and red."),
    Conversation("Who is there?", answer="Nobody."),
    Conversation("What now?", answer="Sleep."),
]
TWO = (Site(1), Site(2, "resid_pre"))


def vector_at(model: Any, sites: Sequence[Site] = (Site(1),)) -> SteeringVector:
    parts = [vector_for(model, scope="response", site=site, seed=seed) for seed, site in enumerate(sites)]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    return replace(parts[0], tensors=tensors, sites=tuple(sites))


def slow_projection(model: Any, item: Any, vector: SteeringVector, site: Site, read: str, kind: str) -> float:
    """One text on its own, token by token; the prompt's end as it is without an answer."""
    given = conversation_of(item)
    text = render(TOKENIZER, replace(given, answer=None) if read == "prompt_last" else given)
    rows = record_ids(model, [text.ids], [site])[site][0]
    chosen = [text.prompt_length - 1] if read == "prompt_last" else range(text.prompt_length, len(text.ids))
    mean = sum(rows[place] for place in chosen) / len(chosen)
    direction = vector.params(site)["direction"]
    found = float(mean @ direction / direction.norm())
    return found / float(mean.norm()) if kind == "cos" else found


def slow_score(model: Any, item: Any, vector: SteeringVector, read: str, kind: str) -> float:
    """Standard deviations of neutral texts, mean over sites, brought to standard deviation 1 again."""

    def standard(one: Any) -> float:
        values = []
        for site in vector.sites:
            calm = torch.tensor([slow_projection(model, text, vector, site, read, kind) for text in NEUTRAL])
            values.append((slow_projection(model, one, vector, site, read, kind) - float(calm.mean())) / calm.std())
        return float(sum(values) / len(values))

    return standard(item) / float(torch.tensor([standard(text) for text in NEUTRAL]).std())


@pytest.mark.parametrize("sites", [(Site(1),), TWO], ids=["one", "two"])
@pytest.mark.parametrize("kind", ["proj", "cos"])
@pytest.mark.parametrize("read", ["prompt_last", "response_mean"])
@pytest.mark.parametrize("family", mostly_slow(["llama", "gpt2"], ["llama"]))
def test_scores_are_the_formula(family: str, read: Any, kind: Any, sites: Any) -> None:
    model = build(family)
    vector = vector_at(model, sites)
    items = ANSWERED if read == "response_mean" else [*PROMPTS, *ANSWERED]
    options: dict[str, Any] = {"read": read, "kind": kind, "neutral": NEUTRAL, "batch_size": 2}
    scores = Monitor(model, TOKENIZER, vector, **options).score(items)
    torch.testing.assert_close(
        scores, torch.tensor([slow_score(model, item, vector, read, kind) for item in items]), rtol=1e-3, atol=1e-4
    )
    raw = Monitor(model, TOKENIZER, vector, calibrated=False, **options).score(items)
    means = [
        sum(slow_projection(model, item, vector, site, read, kind) for site in sites) / len(sites) for item in items
    ]
    torch.testing.assert_close(raw, torch.tensor(means), rtol=1e-4, atol=1e-5)


def test_the_scale_is_that_of_neutral_texts() -> None:
    model = build("llama")
    monitor = Monitor(model, TOKENIZER, vector_at(model, TWO), neutral=NEUTRAL)
    scores = monitor.score(NEUTRAL)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
    assert float(scores.std()) == pytest.approx(1, abs=1e-5)
    shipped = Monitor(model, TOKENIZER, vector_at(model))
    assert float(shipped.score(neutral_texts()).std()) == pytest.approx(1, abs=1e-5)


def test_the_scale_is_that_of_the_baseline_model_and_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from steerkit.steering import readings

    model = build("llama")
    vector = vector_at(model)
    plain = Monitor(model, TOKENIZER, vector, neutral=NEUTRAL)
    plain.score(PROMPTS)
    inside = Monitor(model, TOKENIZER, vector, neutral=NEUTRAL)
    with steerkit.steer(model, vector, strength=2.0, scope="all"):
        steered = inside.score(PROMPTS)  # its neutral texts are read in here
        torch.testing.assert_close(steered, plain.score(PROMPTS))
    assert not torch.allclose(steered, plain.score(PROMPTS))
    # The value read is that after the edit: exactly `strength` lengths further along.
    moved = 2.0 * float(vector.params(Site(1))["direction"].norm()) / float(plain.scale("prompt_last").deviation[0])
    torch.testing.assert_close(steered - plain.score(PROMPTS), torch.full((3,), moved), rtol=1e-3, atol=1e-3)
    calls = []
    monkeypatch.setattr(readings, "record", lambda *args, **kwargs: calls.append(1) or steerkit.record(*args, **kwargs))
    plain.score(PROMPTS)
    assert len(calls) == 1


def test_the_prompt_s_end_is_read_without_the_answer() -> None:
    """Some templates open a thought in the prompt that a given answer closes again."""
    model = build("llama")
    monitor = Monitor(model, THINKS, vector_at(model), neutral=NEUTRAL)
    assert monitor.rendered(["Why?"])[0].text.endswith("<think>\n")
    assert not monitor.rendered(ANSWERED[1:2])[0].text[:-40].endswith("<think>\n")
    baseline = monitor.score([replace(text, answer=None) for text in NEUTRAL])
    assert float(baseline.mean()) == pytest.approx(0, abs=1e-5)
    assert float(baseline.std()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(monitor.score([{"prompt": "Why?", "response": "So."}]), monitor.score(["Why?"]))
    shift = finetuning_shift(build("llama"), finetuned(), THINKS, ANSWERED, vector_at(model))
    plain = [{"prompt": "How are you?"}, "Why?", "Well?"]
    assert torch.equal(
        shift.values, finetuning_shift(build("llama"), finetuned(), THINKS, plain, vector_at(model)).values
    )


def test_items_may_be_written_in_every_way() -> None:
    model = build("llama")
    monitor = Monitor(model, TOKENIZER, vector_at(model), neutral=NEUTRAL)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    ways = [chat, {"messages": chat}, {"prompt": "Why?", "system": "Be kind."}, {"prompt": chat, "more": 1}]
    scores = monitor.score([*ways, Conversation("Why?", system="Be kind."), "Why?", {"prompt": "Why?", "response": ""}])
    # Not to the bit: the rows of a batch need not be summed in one order.
    torch.testing.assert_close(scores[:5], scores[:1].expand(5), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores[5], scores[6], rtol=1e-5, atol=1e-5)
    assert abs(scores[5] - scores[0]) > 1e-3
    assert not torch.equal(monitor.score(["Why?"], raw=True), monitor.score(["Why?"]))
    with pytest.raises(DataError, match="one string"):
        monitor.score("Why?")
    with pytest.raises(DataError, match="no prompts"):
        monitor.score([])
    with pytest.raises(DataError, match="'body'"):
        monitor.score([{"body": "Why?"}])


def test_an_empty_answer_has_no_mean() -> None:
    model = build("llama")
    monitor = Monitor(model, TOKENIZER, vector_at(model), read="response_mean", neutral=NEUTRAL)
    empty = [
        {"prompt": "Why?", "response": ""},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": ""}]},
        "Why?",
    ]
    scores = monitor.score([*empty, ANSWERED[0]])
    assert scores.isnan().tolist() == [True, True, True, False]
    assert bool(monitor.score(empty).isnan().all())


def test_mistakes() -> None:
    model = build("llama")
    vector = vector_at(model)
    for change, error, match in (
        ({"read": "middle"}, DataError, "prompt_last or response_mean"),
        ({"kind": "dot"}, DataError, "proj or cos"),
        ({"sites": ["resid_post.3"]}, SiteError, "resid_post.3"),
        ({"neutral": NEUTRAL[:2]}, DataError, "at least 3"),
        ({"neutral": NEUTRAL[:1] * 4}, DataError, "same projection"),
    ):
        with pytest.raises(error, match=match):
            Monitor(model, TOKENIZER, vector, **change).score(PROMPTS)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no single direction"):
        Monitor(model, TOKENIZER, vector_for(model, scope="front"))
    with pytest.raises(VectorMismatchError):
        Monitor(model, TOKENIZER, replace(vector, num_layers=9))


def test_heat_shows_every_token_at_itself() -> None:
    model = build("llama")
    vector = vector_at(model, TWO)
    monitor = Monitor(model, TOKENIZER, vector, neutral=NEUTRAL)
    for site in TWO:
        shown = monitor.heat(ANSWERED[0], site=site)
        text = render(TOKENIZER, conversation_of(ANSWERED[0]))
        direction = vector.params(site)["direction"]
        rows = record_ids(model, [text.ids], [site])[site][0]
        torch.testing.assert_close(shown.values, rows @ direction / direction.norm(), rtol=1e-4, atol=1e-4)
    assert "".join(shown.tokens) == text.text


@pytest.mark.parametrize("options", [{}, {"read": "response_mean"}, {"kind": "cos"}], ids=str)
def test_the_middle_of_a_heat_map_is_where_tokens_of_neutral_texts_lie(options: Any) -> None:
    model = build("llama")
    monitor = Monitor(model, TOKENIZER, vector_at(model, TWO), neutral=NEUTRAL, **options)
    for site in TWO:
        tokens = torch.cat([monitor.heat(text, site=site).values[1:] for text in NEUTRAL])
        assert monitor.middle(site) == pytest.approx(float(tokens.mean()), abs=1e-4)
        with steerkit.steer(model, monitor.vector, strength=3.0, scope="all"):
            inside = Monitor(model, TOKENIZER, monitor.vector, neutral=NEUTRAL, **options)
            assert inside.middle(site) == pytest.approx(monitor.middle(site))
    assert monitor.middle() == monitor.middle("resid_post.1")
    with pytest.raises(DataError, match=r"resid_post\.3 is not read; give one of resid_post\.1, resid_pre\.2"):
        monitor.middle("resid_post.3")


def test_heat_projects_on_what_the_monitor_reads() -> None:
    """The direction that decides, in a method that writes along others."""
    from steerkit.prompts.contrast_set import ContrastSet

    model = build("llama")
    data = ContrastSet.from_prompts(
        [f"Break into the {one}" for one in "abcd"], [f"Walk to the {one}" for one in "efgh"]
    )
    vector = steerkit.fit(model, TOKENIZER, data, method="conditional")
    monitor = Monitor(model, TOKENIZER, vector, neutral=NEUTRAL, calibrated=False)
    assert method_of(vector).direction(vector.params(monitor.sites[0])) is None
    shown = monitor.heat("Why?")
    torch.testing.assert_close(shown.values[-1:], monitor.score(["Why?"]), rtol=1e-4, atol=1e-4)
    elsewhere = monitor.heat("Why?", site="resid_post.0")
    assert elsewhere.site == Site(0)


# Reading while the model generates.

NEW = 6


def forward_values(model: Any, monitor: Monitor, ids: Sequence[int], vector: Any = None, prompt: int = 0) -> Tensor:
    """Calibrated numbers [t] of every token of one row, from one plain pass: the prompt's in the prompt's scale."""
    steering = contextlib.nullcontext() if vector is None else steerkit.steer(model, vector, prompt_lengths=prompt)
    with steering:
        found = record_ids(model, [ids], monitor.sites)
    columns = torch.stack([monitor.along(site, found[site][0]) for site in monitor.sites], dim=-1)
    parts = (columns[:prompt], "prompt_last"), (columns[prompt:], "response_mean")
    return torch.cat([monitor.scaled(part, differences=False, read=read) for part, read in parts])  # type: ignore[arg-type]


def generated(model: Any, prompts: Sequence[Sequence[int]], *, side: str = "left", **options: Any) -> Tensor:
    ids, mask = rows_of(prompts, side=side)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": None}
    out: Tensor = model.generate(input_ids=ids, attention_mask=mask, **{**settings, **options})
    return out


def check(
    model: Any,
    monitor: Monitor,
    watched: Watched,
    out: Tensor,
    prompts: Sequence[Sequence[int]],
    *,
    vector: Any = None,
    each: int = 1,
) -> None:
    """What was read is what one plain pass over the finished text shows; its last token has been read by nobody."""
    call = watched.last
    assert call.prompt is not None
    width = max(map(len, prompts))
    for row in range(len(out)):
        prompt = prompts[row // each]
        answer = out[row, width:].tolist()
        expected = forward_values(model, monitor, [*prompt, *answer], vector, len(prompt))
        torch.testing.assert_close(call.prompt[row], expected[len(prompt) - 1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(call.tokens[row], expected[len(prompt) : -1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(call.mean[row], expected[len(prompt) : -1].mean(), rtol=1e-3, atol=1e-3)


MODES: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 2},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", mostly_slow(["llama", "gpt2", "falcon", "opt"], ["llama", "falcon"]))
def test_watching_reads_what_flows_on(family: str, mode: str, steered: bool) -> None:
    model = build(family)
    vector = vector_at(model, TWO)
    monitor = Monitor(model, TOKENIZER, vector, read="response_mean", neutral=NEUTRAL)
    prompts = [SHORT, LONG]
    if steered:
        with monitor.watch() as watched, steerkit.steer(model, vector):
            out = generated(model, prompts, **MODES[mode])
        check(model, monitor, watched, out, prompts, vector=vector)
        plain = generated(model, prompts)
        assert not torch.equal(plain, out)
        with steerkit.steer(model, vector), monitor.watch() as other:  # the other way round
            generated(model, prompts, **MODES[mode])
        assert torch.equal(other.last.tokens, watched.last.tokens)
    else:
        with monitor.watch() as watched:
            out = generated(model, prompts, **MODES[mode])
        check(model, monitor, watched, out, prompts)
        assert torch.equal(out, generated(model, prompts, **MODES[mode]))


@pytest.mark.parametrize("family", ["mamba", "gemma3_vlm", "bloom", "gpt_oss", "qwen3_next", "mixtral"])
def test_watching_works_in_other_families(family: str) -> None:
    model = build(family)
    vector = vector_at(model)
    monitor = Monitor(model, TOKENIZER, vector, read="response_mean", neutral=NEUTRAL)
    with monitor.watch() as watched, steerkit.steer(model, vector):
        out = generated(model, [SHORT, LONG])
    check(model, monitor, watched, out, [SHORT, LONG], vector=vector)


@pytest.mark.parametrize("kind", ["proj", "cos"])
@pytest.mark.parametrize("read", ["prompt_last", "response_mean"])
def test_the_watched_mean_is_the_score_of_the_text(read: Any, kind: Any) -> None:
    model = build("llama")
    monitor = Monitor(model, TOKENIZER, vector_at(model, TWO), read=read, kind=kind, neutral=NEUTRAL)
    scorer = Monitor(model, TOKENIZER, monitor.vector, read="response_mean", kind=kind, neutral=NEUTRAL)
    ids = monitor.rendered(["Why?"])[0].ids
    with monitor.watch() as watched:
        out = generated(model, [ids])
    read_ids = out[0, :-1].tolist()  # the last token is never fed
    found = record_ids(model, [read_ids], monitor.sites)
    means = [monitor.along(site, found[site][0][len(ids) :].mean(dim=0)) for site in monitor.sites]
    expected = scorer.scaled(torch.stack(means), differences=False)
    torch.testing.assert_close(watched.last.mean[0], expected, rtol=1e-3, atol=1e-3)
    (asked,) = Monitor(model, TOKENIZER, monitor.vector, kind=kind, neutral=NEUTRAL).score(["Why?"])
    assert watched.last.prompt is not None
    torch.testing.assert_close(watched.last.prompt[0], asked, rtol=1e-3, atol=1e-3)


def test_guidance_makes_one_entry() -> None:
    model = build("llama")
    monitor = Monitor(model, TOKENIZER, vector_at(model), neutral=NEUTRAL)
    steps: list[Step] = []
    for negative in (SHORT, LONG[:1]):
        steps.clear()
        with monitor.watch(steps.append) as watched:
            out = generated(model, [LONG], guidance_scale=1.5, negative_prompt_ids=torch.tensor([negative]))
        assert len(watched.calls) == 1
        assert [step.number for step in steps] == list(range(NEW))
        check(model, monitor, watched, out, [LONG])


def test_watching_reads_nothing_of_a_thread_that_steers_by_itself() -> None:
    model = build("llama")
    vector = vector_at(model, TWO)
    monitor = Monitor(model, TOKENIZER, vector, neutral=NEUTRAL)

    def steered() -> None:
        with steerkit.steer(model, vector):
            generated(model, [LONG])

    with monitor.watch() as watched:
        generated(model, [SHORT])
        other = threading.Thread(target=steered)
        other.start()
        other.join(60)
        worker = threading.Thread(target=generated, args=(model, [SHORT]))  # it steers nothing: a streamer's
        worker.start()
        worker.join(60)
    assert len(watched.calls) == 2
    assert torch.equal(watched.calls[0].tokens, watched.calls[1].tokens)


def test_watching_copies_to_a_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to the accelerator in every pass would make the host wait for it."""
    model = build("llama")
    monitor = Monitor(model, TOKENIZER, vector_at(model, TWO), neutral=NEUTRAL)
    monitor.scale("prompt_last"), monitor.scale("response_mean")
    copied: list[str] = []
    plain = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and args[0] == torch.device("meta"):
            copied.append("one")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    rows = torch.zeros(2, 32, device="meta")
    for _ in range(3):
        columns = torch.stack([monitor.along(site, rows) for site in monitor.sites], dim=-1)
        monitor.scaled(columns, differences=False)
        monitor.scaled(columns, differences=False, read="response_mean")
    assert len(copied) == 2 + 2 + 2  # directions, and mean and deviation of both scales


def test_watching_reads_after_the_edit() -> None:
    model = build("llama")
    vector = vector_at(model)
    monitor = Monitor(model, TOKENIZER, vector, calibrated=False)
    with monitor.watch() as baseline:
        generated(model, [LONG])
    with monitor.watch() as watched, steerkit.steer(model, vector, strength=2.0):
        generated(model, [LONG])
    length = float(vector.params(Site(1))["direction"].norm())
    assert baseline.last.prompt is not None
    assert watched.last.prompt is not None
    torch.testing.assert_close(
        watched.last.prompt - baseline.last.prompt, torch.tensor([2 * length]), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_sides_and_returned_sequences(side: str) -> None:
    model = build("llama")
    monitor = Monitor(model, TOKENIZER, vector_at(model), neutral=NEUTRAL)
    prompts = [SHORT, LONG]
    torch.manual_seed(0)
    with monitor.watch() as watched:
        out = generated(model, prompts, side=side, do_sample=True, num_return_sequences=3)
    assert watched.last.tokens.shape == (6, NEW - 1)
    assert watched.last.prompt is not None
    for row in range(6):
        prompt = prompts[row // 3]
        expected = forward_values(model, monitor, prompt, prompt=len(prompt))[
            -1
        ]  # at the right, of the last real token
        torch.testing.assert_close(watched.last.prompt[row], expected, rtol=1e-3, atol=1e-3)
    if side == "left":
        check(model, monitor, watched, out, prompts, each=3)
        assert len({tuple(row) for row in out.tolist()}) > 2


def test_ended_rows_count_no_more() -> None:
    model = build("llama")
    monitor = Monitor(model, TOKENIZER, vector_at(model), neutral=NEUTRAL)
    prompts = [SHORT, LONG]
    free = generated(model, prompts)
    width = len(LONG)
    answer = free[0, width:].tolist()
    end = next(token for token in answer[2:] if token not in answer[:2] and token not in free[1, width:].tolist())
    stop = answer.index(end)
    with monitor.watch() as watched:
        out = generated(model, prompts, min_new_tokens=None, eos_token_id=end, pad_token_id=PAD)
    assert out[0, width + stop :].tolist() == [end] + [PAD] * (NEW - stop - 1)
    call = watched.last
    expected = forward_values(model, monitor, [*SHORT, *answer[:stop]], prompt=len(SHORT))[len(SHORT) :]
    torch.testing.assert_close(call.tokens[0, :stop], expected, rtol=1e-3, atol=1e-3)
    assert bool(call.tokens[0, stop:].isnan().all())
    torch.testing.assert_close(call.mean[0], expected.mean(), rtol=1e-3, atol=1e-3)
    assert not bool(call.tokens[1].isnan().any())


def test_steps_come_as_they_are_read() -> None:
    model = build("llama")
    monitor = Monitor(model, TOKENIZER, vector_at(model), neutral=NEUTRAL)
    steps: list[Step] = []
    with monitor.watch(steps.append) as watched:
        generated(model, [SHORT, LONG])
    assert [step.number for step in steps] == list(range(NEW))
    assert watched.last.prompt is not None
    assert torch.equal(steps[0].values, watched.last.prompt)
    assert bool(steps[0].mean.isnan().all())
    for step in steps[1:]:
        torch.testing.assert_close(step.mean, watched.last.tokens[:, : step.number].mean(dim=1))
    assert torch.equal(torch.stack([step.values for step in steps[1:]], dim=1), watched.last.tokens)


def test_every_call_is_kept_apart_and_other_passes_are_not_read() -> None:
    model = build("llama")
    monitor = Monitor(model, TOKENIZER, vector_at(model), neutral=NEUTRAL)
    with monitor.watch() as watched:
        with pytest.raises(DataError, match="nothing yet"):
            _ = watched.last
        model(input_ids=torch.tensor([LONG]))
        monitor.score(PROMPTS)
        texts = steerkit.generate(model, TOKENIZER, PROMPTS, max_new_tokens=3, batch_size=2)
        generated(model, [SHORT])
    assert len(texts) == 3
    assert [call.tokens.shape[0] for call in watched.calls] == [2, 1, 1]


def test_a_worker_thread_is_read_too() -> None:
    model = build("llama")
    monitor = Monitor(model, TOKENIZER, vector_at(model), neutral=NEUTRAL)
    outs: list[Tensor] = []
    with monitor.watch() as watched:
        worker = threading.Thread(target=lambda: outs.append(generated(model, [SHORT])))
        worker.start()
        worker.join()
    check(model, monitor, watched, outs[0], [SHORT])


def test_watching_leaves_nothing() -> None:
    model = build("llama")
    monitor = Monitor(model, TOKENIZER, vector_at(model), neutral=NEUTRAL)

    def hooks() -> int:
        return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())

    before = hooks()
    with pytest.raises(RuntimeError), monitor.watch() as watched:
        twin = copy.deepcopy(model)
        generated(twin, [SHORT])
        assert watched.calls == []
        raise RuntimeError
    assert hooks() == before


def test_what_cannot_be_watched_is_refused() -> None:
    model = build("llama")
    monitor = Monitor(model, TOKENIZER, vector_at(model), neutral=NEUTRAL)
    with monitor.watch():
        with pytest.raises(ScopeError, match="beams"):
            generated(model, [SHORT], num_beams=2)
        with pytest.raises(ScopeError, match="assisted"):
            generated(model, [[5, 6, 7, 5, 6, 7, 5, 6]], prompt_lookup_num_tokens=2, max_matching_ngram_size=2)
    model.compile(backend="eager")
    with pytest.raises(ModelError, match="compile"), monitor.watch():
        pass
    torch._dynamo.reset()


# Shift and difference.


def finetuned() -> Any:
    """A model that adds something along the vector to what block 1's MLP gives."""
    model = build("llama")
    direction = vector_at(model).params(Site(1))["direction"]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(0.5 * direction[:, None] * direction[None, :1].abs())
        model.model.embed_tokens.weight.add_(0.1 * direction)
    return model


@pytest.mark.parametrize("calibrated", [False, True])
def test_shift_is_the_formula(calibrated: bool) -> None:
    before, after = build("llama"), finetuned()
    vector = vector_at(before)
    shift = finetuning_shift(before, after, TOKENIZER, PROMPTS, vector, calibrated=calibrated)
    values = [
        slow_projection(after, prompt, vector, Site(1), "prompt_last", "proj")
        - slow_projection(before, prompt, vector, Site(1), "prompt_last", "proj")
        for prompt in PROMPTS
    ]
    calm = [slow_projection(before, text, vector, Site(1), "prompt_last", "proj") for text in neutral_texts()]
    scale = float(torch.tensor(calm).std()) if calibrated else 1.0
    torch.testing.assert_close(shift.values, torch.tensor(values) / scale, rtol=1e-3, atol=1e-4)
    assert shift.estimate.mean == pytest.approx(sum(values) / 3 / scale, rel=1e-3)
    assert shift.estimate.low < shift.estimate.mean < shift.estimate.high
    assert shift.estimate.mean > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_shift_of_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    vector = vector_at(build("llama"))
    torch.manual_seed(0)
    after = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    assert finetuning_shift(None, after, TOKENIZER, PROMPTS, vector).estimate.mean == 0  # B is zero
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    shift = finetuning_shift(None, after, TOKENIZER, PROMPTS, vector)
    expected = finetuning_shift(build("llama"), after, TOKENIZER, PROMPTS, vector)
    torch.testing.assert_close(shift.values, expected.values, rtol=1e-4, atol=1e-4)
    assert float(shift.values.abs().min()) > 0.01
    with pytest.raises(ModelError, match="one object"):
        finetuning_shift(after.get_base_model(), after, TOKENIZER, PROMPTS, vector)
    with pytest.raises(ModelError, match="no adapter"):
        finetuning_shift(None, build("llama"), TOKENIZER, PROMPTS, vector)


@pytest.mark.parametrize("cheap", [False, True])
def test_difference_is_the_formula(cheap: bool) -> None:
    model = build("llama")
    vector = vector_at(model)
    found = projection_difference(model, TOKENIZER, ANSWERED, vector, cheap=cheap, calibrated=False, max_new_tokens=5)
    prompts = [conversation_of(item) for item in ANSWERED]
    values = []
    for item in prompts:
        baseline = Conversation(item.prompt)
        (own,) = steerkit.generate(model, TOKENIZER, [baseline], max_new_tokens=5)
        other = baseline if cheap else Conversation(item.prompt, answer=own)
        read = "prompt_last" if cheap else "response_mean"
        given = slow_projection(model, item, vector, Site(1), "response_mean", "proj")
        values.append(given - slow_projection(model, other, vector, Site(1), read, "proj"))
    torch.testing.assert_close(found.values, torch.tensor(values), rtol=1e-3, atol=1e-3)
    assert found.estimate.mean == pytest.approx(sum(values) / 3, abs=1e-3)
    assert (found.answers is None) is cheap
    scaled = projection_difference(model, TOKENIZER, ANSWERED, vector, cheap=cheap, max_new_tokens=5)
    calm = [slow_projection(model, text, vector, Site(1), "response_mean", "proj") for text in neutral_texts()]
    torch.testing.assert_close(scaled.values * torch.tensor(calm).std(), found.values, rtol=1e-3, atol=1e-3)


def test_samples_without_answers_are_left_out() -> None:
    model = build("llama")
    data = [*ANSWERED, {"prompt": "And?", "response": ""}, {"prompt": "So?"}]
    own = ["Yes.", "", "No.", "Well.", "Hm."]
    found = projection_difference(model, TOKENIZER, data, vector_at(model), own=own)
    assert found.values.isnan().tolist() == [False, True, False, True, True]
    assert found.estimate.mean == pytest.approx(float(found.values[[0, 2]].mean()), abs=1e-5)
    for wrong, match in (({"own": ["Yes."]}, "1 own answers for 5"), ({"own": own, "cheap": True}, "beside cheap")):
        with pytest.raises(DataError, match=match):
            projection_difference(model, TOKENIZER, data, vector_at(model), **wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no sample has an answer"):
        projection_difference(model, TOKENIZER, ["Why?"], vector_at(model))


def test_neither_side_of_a_difference_is_read_with_its_thoughts() -> None:
    model = build("llama")
    said = ["Because.", "Me."]
    thought = [
        {"prompt": prompt, "response": f"<think>Hm, let me see about that.</think>\n\n{text}"}
        for prompt, text in zip(("Why?", "Who?"), said, strict=True)
    ]
    unended = {"prompt": "When?", "response": "<think>Well"}
    found = projection_difference(model, TOKENIZER, [*thought, unended], vector_at(model), own=[*said, "Now."])
    assert found.values.tolist()[:2] == pytest.approx([0, 0], abs=1e-6)
    assert bool(found.given[2].isnan())
    own = [sample["response"] for sample in thought]
    found = projection_difference(model, TOKENIZER, thought, vector_at(model), own=own)
    assert found.values.tolist() == pytest.approx([0, 0], abs=1e-6)
    with pytest.raises(DataError, match="no sample has an answer"):
        projection_difference(model, TOKENIZER, [unended], vector_at(model))


def test_an_adapter_that_fails_without_a_word_is_still_an_error(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise ValueError

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"cannot be put on the model \(ValueError\)"):
        with_adapter(build("llama"), tmp_path)


def test_own_answers_are_generated_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from steerkit.monitor import difference

    model, store = build("llama"), tmp_path / "own.jsonl"
    prompts = [Conversation(f"Number {number}, is it good?") for number in range(5)]
    asked: list[Any] = []

    def generate(*args: Any, **kwargs: Any) -> list[str]:
        if len(asked) >= 4:
            raise KeyboardInterrupt
        asked.extend(args[2])
        return steerkit.generate(*args, **kwargs)

    monkeypatch.setattr(difference, "generate", generate)
    options: dict[str, Any] = {"max_new_tokens": 4, "store": store, "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        own_answers(model, TOKENIZER, prompts, **options)
    with store.open("ab") as handle:
        handle.write(b'{"key": "torn')
    asked.clear()
    texts = own_answers(model, TOKENIZER, prompts, **options)
    assert len(asked) == 1
    asked.clear()
    assert own_answers(model, TOKENIZER, prompts, **options) == texts
    assert asked == []
    assert texts == steerkit.generate(model, TOKENIZER, prompts, max_new_tokens=4)
    own_answers(finetuned(), TOKENIZER, prompts[:2], **options)  # another model answers anew
    assert len(asked) == 2


# Intervals.


def test_correlation_is_pearson_s_with_fisher_s_interval() -> None:
    from scipy.stats import pearsonr

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, generator=generator, dtype=torch.double)
    y = 0.5 * x + torch.randn(30, generator=generator, dtype=torch.double)
    found, expected = correlation(x, y), pearsonr(x.numpy(), y.numpy())
    assert found.mean == pytest.approx(expected.statistic)
    assert found[1:] == pytest.approx(tuple(expected.confidence_interval(0.95)))
    gaps = torch.cat([x, torch.tensor([torch.nan, 1.0])]), torch.cat([y, torch.tensor([2.0, torch.nan])])
    assert correlation(*gaps) == found
    assert correlation(x[:3], y[:3])[1:] == (-1.0, 1.0)
    assert correlation(x, 2 * x + 1) == pytest.approx((1, 1, 1), abs=1e-6)
    for pair, error in (((x[:2], y[:2]), NotScored), ((x, torch.ones(30)), NotScored), ((x, y[:3]), DataError)):
        with pytest.raises(error):
            correlation(*pair)


def test_separability_is_the_share_of_couples() -> None:
    plus, minus = torch.tensor([1.0, 2.0, 2.0, torch.nan]), torch.tensor([0.0, 2.0])
    couples = [(a > b) + 0.5 * (a == b) for a in plus[:3].tolist() for b in minus.tolist()]
    assert separability(plus, minus).mean == pytest.approx(sum(couples) / 6)
    apart = separability(torch.arange(20.0) + 100, torch.arange(20.0))
    assert (apart.mean, apart.high) == (1.0, 1.0)
    assert 0.8 < apart.low < 0.99  # not certain, though no couple is wrong
    turned = separability(torch.arange(20.0), torch.arange(20.0) + 100)
    assert turned == pytest.approx((0.0, 0.0, 1 - apart.low))
    with pytest.raises(NotScored):
        separability(plus[3:], minus)


def coverage(draw: Any, truth: float, *, runs: int = 400) -> float:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(runs):
        found = draw(generator)
        hits += found.low <= truth <= found.high
    return hits / runs


@pytest.mark.parametrize("gap", [0.0, 1.0, 2.5])
def test_intervals_of_areas_cover(gap: float) -> None:
    """Normal sides: the true area is Phi(gap / sqrt 2)."""
    truth = float(0.5 * (1 + torch.erf(torch.tensor(gap / 2))))

    def draw(generator: torch.Generator) -> Any:
        return separability(torch.randn(20, generator=generator) + gap, torch.randn(30, generator=generator))

    assert coverage(draw, truth) >= 0.93


@pytest.mark.parametrize("truth", [0.0, 0.8])
def test_intervals_of_correlations_cover(truth: float) -> None:
    def draw(generator: torch.Generator) -> Any:
        x = torch.randn(20, generator=generator)
        return correlation(x, truth * x + (1 - truth**2) ** 0.5 * torch.randn(20, generator=generator))

    assert coverage(draw, truth) >= 0.93
