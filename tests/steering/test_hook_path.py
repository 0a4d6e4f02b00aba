"""What a hook does in a decoding step: no look at a tensor's values, few calls, and no more of them in a long text."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

import steerkit
from steerkit.composition import Composition
from steerkit.methods._addition import MeanDifference
from steerkit.methods._base import Method
from steerkit.methods._protocols import Gated
from steerkit.methods._registry import method_names
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.marks import Marks
from steerkit.tokens.generate_frames import GenerateFrames
from steerkit.tokens.scope import WINDOWS
from steerkit.vector.steering_vector import SteeringVector
from tests import modes
from tests.families import BLOCKS, build
from tests.gated import gated_vector
from tests.methods.test_every_method import data_for, families_of
from tests.plugged import register
from tests.ready import ready
from tests.steering.test_when import HOLD, KINDS, RULES, known
from tests.tiny_tokenizers import CHATML, byte_tokenizer

PACKAGE = str(Path(steerkit.__file__).parent)
LOOKS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__contains__")
COUNTED = {"first": "first(3)", "after": "after(0)"}
TOKENIZER = byte_tokenizer(CHATML)


def model_of(family: str = "llama") -> Any:
    return built(family)


@functools.cache
def built(family: str) -> Any:
    """One model of a family for all tests, however it is asked for."""
    return build(family)


def answer(prompts: list[Any], count: int, step: Callable[[], None] | None = None, *, family: str = "llama") -> None:
    """Generate; `step` is called behind each pass."""
    ids, mask = modes.rows_of(prompts)

    def seen(_ids: Tensor, scores: Tensor) -> Tensor:
        if step is not None:
            step()
        return scores

    with torch.no_grad():
        model_of(family).generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0, eos_token_id=None, logits_processor=LogitsProcessorList([seen]),
        )  # fmt: skip


# --- nothing waits for the device ------------------------------------------------------------------------------------


class Looks:
    """Fails where the package, or this file, looks at what a tensor holds while `forbidden` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forbidden = False
        for name in LOOKS:
            monkeypatch.setattr(Tensor, name, self._guarded(name, getattr(Tensor, name)))

    def _guarded(self, name: str, real: Any) -> Any:
        def look(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            home = frame.f_code.co_filename
            if self.forbidden and (home.startswith(PACKAGE) or home == __file__):
                self.forbidden = False
                raise AssertionError(f"{name} in line {frame.f_lineno} of {home}")
            return real(tensor, *args, **kwargs)

        return look

    def forbid(self) -> None:
        self.forbidden = True


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Looks]:
    watched = Looks(monkeypatch)
    yield watched
    watched.forbidden = False


@functools.cache
def fitted(name: str) -> tuple[Method, SteeringVector]:
    method = ready(name)
    return method, steerkit.fit(model_of(families_of(name)[0]), TOKENIZER, data_for(method), method=method)


@pytest.mark.parametrize("name", method_names())
def test_no_step_looks_at_a_tensor(looks: Looks, name: str) -> None:
    """Gates decide, and windows are measured, once in a prompt; nothing else looks in the prompt's pass either."""
    method, vector = fitted(name)
    family = families_of(name)[0]
    for kind in method.scopes:
        once = isinstance(method, Gated) or kind in WINDOWS
        with steerkit.steer(model_of(family), vector, 1.0, scope=COUNTED.get(kind, kind), tokenizer=TOKENIZER):
            looks.forbidden = not once
            answer([modes.LONG, modes.SHORT], 3, looks.forbid, family=family)
            looks.forbidden = False


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_looks_at_a_reading(looks: Looks, kind: str) -> None:
    """Nor does the prompt's pass, but where the prompt decides."""
    line = HOLD if kind == "hold" else RULES[kind][0]
    with steerkit.steer(model_of(), Composition.parse(line).vectors(known())):
        looks.forbidden = not kind.startswith("prompt")
        answer([modes.LONG, modes.SHORT], 4, looks.forbid)
        looks.forbidden = False


@dataclass(frozen=True)
class Looking(MeanDifference):
    """What the test is for: strength 1 adds the direction, where the sum of what it edits is positive."""

    name = "looking"
    title = paper = "looks at what it edits"

    def edit(self, h: Tensor, prepared: Any, tokens: Any) -> Tensor:
        return super().edit(h, prepared, tokens) if h.sum() > 0 else h


def test_a_look_is_noticed(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Looking)
    plain = modes.vector_for(model_of(), scope="all")
    vector = replace(plain, method="looking")
    with steerkit.steer(model_of(), vector), pytest.raises(AssertionError, match="__bool__"):
        answer([modes.SHORT], 3, looks.forbid)


# --- few calls, however long the text --------------------------------------------------------------------------------


def calls(vector: SteeringVector, strength: Any, prompts: list[Any], **options: Any) -> Counter[str]:
    """How often each function of the package is called in one decoding step."""
    counted: Counter[str] = Counter()

    def note(frame: Any, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            counted[frame.f_code.co_qualname] += 1

    totals = []
    with steerkit.steer(model_of(), vector, strength, **options):
        answer(prompts, 2)
        for count in (4, 8):
            counted.clear()
            sys.setprofile(note)
            try:
                answer(prompts, count)
            finally:
                sys.setprofile(None)
            totals.append(counted.copy())
    few, many = totals
    each = {name: many[name] - few[name] for name in many}
    assert all(number % 4 == 0 for number in each.values()), each
    return Counter({name: number // 4 for name, number in each.items() if number})


def at(layers: int, scope: str = "response") -> SteeringVector:
    one = modes.vector_for(model_of(), scope=scope, site=Site(0))
    sites = tuple(map(Site, range(layers)))
    tensors = {f"{site}/direction": one.tensors["resid_post.0/direction"] for site in sites}
    return replace(one, tensors=tensors, sites=sites)


MOST_IN_A_PASS = 36
MOST_AT_A_SITE = 8


def test_a_step_makes_few_calls() -> None:
    one, all_of_them = (calls(at(layers), 1.0, [modes.SHORT]) for layers in (1, BLOCKS))
    assert one.total() <= MOST_IN_A_PASS + MOST_AT_A_SITE, one
    assert all_of_them.total() - one.total() <= MOST_AT_A_SITE * (BLOCKS - 1), all_of_them - one


def test_a_site_at_its_neutral_strength_costs_nothing() -> None:
    blocks = find_decoder(model_of()).blocks
    neutral = calls(at(BLOCKS), 0.0, [modes.SHORT])
    assert neutral.total() <= MOST_IN_A_PASS
    assert not any("Edit" in name or "Dispatcher" in name for name in neutral)
    with steerkit.steer(model_of(), at(BLOCKS), 0.0) as steering:
        assert not any(block._forward_hooks for block in blocks)
        steering.strength = 1.0
        assert all(len(block._forward_hooks) == 1 for block in blocks)
        steering.strength = 0.0
        assert not any(block._forward_hooks for block in blocks)


def test_edits_keep_their_order_while_they_come_and_go() -> None:
    first = modes.vector_for(model_of(), scope="all")
    second = replace(modes.vector_for(model_of(), scope="all", seed=1), method="ablation", edit="project_out")
    ids = torch.tensor([modes.SHORT])
    with torch.no_grad():
        with steerkit.steer(model_of(), [first.at(1.0), second.at(1.0)]):
            expected = model_of()(ids).logits
        with steerkit.steer(model_of(), [second.at(1.0), first.at(1.0)]):
            assert not torch.equal(model_of()(ids).logits, expected)
        with steerkit.steer(model_of(), first, 1.0) as outer, steerkit.steer(model_of(), second, 0.0) as inner:
            inner.strength = 1.0
            assert torch.equal(model_of()(ids).logits, expected)
            outer.strength = inner.strength = 0.0
            inner.strength = 1.0
            outer.strength = 1.0
            assert torch.equal(model_of()(ids).logits, expected)


def test_a_gate_reads_again_where_its_strength_is_no_longer_neutral() -> None:
    """Also in a second context of the same steering, which knows from the first that there is nothing to read."""
    steering = steerkit.steer(model_of(), gated_vector(model_of()), 0.0)
    blocks = find_decoder(model_of()).blocks
    for _ in range(2):
        steering.strength = 0.0
        with steering:
            assert not any(block._forward_hooks for block in blocks)
            steering.strength = 2.0
            assert sum(bool(block._forward_hooks) for block in blocks) == 2
            got = modes.generate(model_of(), [modes.SHORT])[0].answer
        with steerkit.steer(model_of(), gated_vector(model_of()), 2.0):
            assert got == modes.generate(model_of(), [modes.SHORT])[0].answer
    assert got != modes.generate(model_of(), [modes.SHORT])[0].answer


@pytest.mark.parametrize("scope", ["response", "assistant", "answer", "after(0)", "generated(40)"])
def test_a_long_text_costs_no_more_calls_than_a_short_one(scope: str) -> None:
    short, long = (
        calls(at(1, "response"), 1.0, [ids], scope=scope, tokenizer=TOKENIZER) for ids in (modes.SHORT, modes.LONG * 4)
    )
    assert short == long


@pytest.mark.parametrize("scope", ["assistant", "answer", "after(0)"])
def test_a_role_is_read_on_from_step_to_step(monkeypatch: pytest.MonkeyPatch, scope: str) -> None:
    read: list[int] = []
    real = Marks.read_on

    def read_on(marks: Marks, kind: str, count: int, ids: Tensor, before: Any = None) -> Any:
        read.append(ids.shape[1])
        return real(marks, kind, count, ids, before)

    monkeypatch.setattr(Marks, "read_on", read_on)
    with steerkit.steer(model_of(), at(2), 1.0, scope=scope, tokenizer=TOKENIZER):
        read.clear()  # the template was tried out
        answer([modes.LONG], 6)
    width = len(modes.LONG)
    assert read == [width, width + 1, 1, 1, 1, 1], "the prompt, once the whole text behind it, and then what is new"


def test_the_stack_is_searched_once_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[None] = []
    real = GenerateFrames._search

    def search(frames: GenerateFrames) -> Any:
        searched.append(None)
        return real(frames)

    monkeypatch.setattr(GenerateFrames, "_search", search)
    with steerkit.steer(model_of(), at(1), 1.0):
        for number in range(1, 4):
            answer([modes.SHORT], 5)
            assert len(searched) == number
