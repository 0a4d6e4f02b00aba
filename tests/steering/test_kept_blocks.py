"""Blocks before the first steered one run once: the same numbers as without, in every family, or not used."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import steerkit
from steerkit.evaluate.scorers._answers import calm_texts
from steerkit.evaluate.scorers.divergence import Divergence
from steerkit.evaluate.scorers.preference_margin import PreferenceMargin
from steerkit.evaluate.setup import Setup
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.rendering import Rendered
from steerkit.steering.kept_blocks import KeptBlocks
from tests.choices import mostly_slow
from tests.families import FAMILIES, FURTHER, build
from tests.modes import vector_for
from tests.tiny_tokenizers import byte_tokenizer

family = lru_cache(maxsize=None)(build)
IDS = torch.tensor([[0, 0, 7, 9, 11, 4, 30, 8], [5, 6, 7, 9, 12, 4, 31, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
PROMPTS = torch.tensor([3, 5])
DATA = ContrastSet.from_dataset(
    [
        {"prompt": "How is it?", "positive": "Fine, thank you.", "negative": "Bad, alas."},
        {"prompt": "And now?", "positive": "Well.", "negative": "Ill, as ever."},
    ]
)


def logits(model: Any, vector: Any, strength: float, kept: KeptBlocks | None, texts: str = "these texts") -> Tensor:
    """[2, 8, v] of one steered pass."""
    decoder = find_decoder(model)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    with torch.no_grad(), steerkit.steer(model, vector, strength, prompt_lengths=PROMPTS) as steering:
        if kept is None:
            return model(**inputs).logits  # type: ignore[no-any-return]
        with kept.around(decoder, steering, texts):
            return model(**inputs).logits  # type: ignore[no-any-return]


def flops(model: Any, vector: Any, kept: KeptBlocks | None, texts: str = "these texts") -> float:
    """Floating-point operations of one steered pass."""
    with FlopCounterMode(display=False) as counter:
        logits(model, vector, 1.0, kept, texts)
    return float(counter.get_total_flops())


@pytest.mark.parametrize("name", mostly_slow([*FAMILIES, *FURTHER], [*FAMILIES, *list(FURTHER)[::3]]))
def test_the_same_numbers_as_without(name: str) -> None:
    model = family(name).eval()
    vector = vector_for(model, scope="response", site=Site(2))
    kept = KeptBlocks()
    for strength in (1.0, -0.5, 1.0):
        assert torch.equal(logits(model, vector, strength, kept), logits(model, vector, strength, None))


def test_known_blocks_do_not_run() -> None:
    model = family("llama").eval()
    kept = KeptBlocks()
    inside, after = (vector_for(model, scope="response", site=Site(2, kind)) for kind in ("mlp_out", "resid_post"))
    for vector in (inside, after):
        logits(model, vector, 1.0, KeptBlocks())  # whether a family allows it is found out in passes of their own
    whole = flops(model, after, None)
    head = 2 * 2 * 8 * 32 * 320
    block = (whole - head) / 4
    assert flops(model, inside, kept) == whole  # from now on two blocks are known
    assert flops(model, inside, kept) == head + 2 * block
    assert flops(model, after, kept) == head + 2 * block  # and now three
    assert flops(model, after, kept) == head + block
    assert "forward" not in vars(find_decoder(model).blocks[0])


def test_what_is_used_longest_ago_goes_first() -> None:
    model = family("llama").eval()
    vector = vector_for(model, scope="response", site=Site(2))
    logits(model, vector, 1.0, KeptBlocks())  # whether a family allows it is found out in passes of their own
    size = 2 * 8 * 32 * 4
    kept, whole = KeptBlocks(budget=2 * size), flops(model, vector, None)
    for texts, is_known in (("a", False), ("b", False), ("a", True), ("c", False), ("a", True), ("b", False)):
        assert (flops(model, vector, kept, texts) < whole) == is_known, texts
    assert flops(model, vector, KeptBlocks(budget=size - 1)) == flops(model, vector, KeptBlocks(budget=0)) == whole


def test_nothing_is_left_out_where_somebody_watches() -> None:
    model = family("llama").eval()
    vector = vector_for(model, scope="response", site=Site(2))
    kept, seen = KeptBlocks(), []
    logits(model, vector, 1.0, kept)
    handle = find_decoder(model).blocks[0].register_forward_hook(lambda *_: seen.append(1))
    logits(model, vector, 1.0, kept)
    handle.remove()
    assert seen == [1]


def test_blocks_that_hand_on_more_than_the_stream_all_run() -> None:
    model = family("gemma4_kv_shared").eval()  # the last blocks read keys and values of earlier ones
    vector = vector_for(model, scope="response", site=Site(2))
    kept = KeptBlocks()
    logits(model, vector, 1.0, kept)
    whole = flops(model, vector, None)
    assert flops(model, vector, kept) == whole


def test_an_error_inside_leaves_nothing_behind() -> None:
    model = family("llama").eval()
    vector = vector_for(model, scope="response", site=Site(2))
    kept, decoder = KeptBlocks(), find_decoder(model)
    logits(model, vector, 1.0, kept)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        steerkit.steer(model, vector, 1.0) as steering,
        kept.around(decoder, steering, "these texts"),
    ):
        raise RuntimeError("on purpose")
    assert not any("forward" in vars(block) for block in decoder.blocks)


TEXTS = [
    Rendered("", tuple(ids), length, ())
    for ids, length in (([7, 9, 11, 4, 30, 8], 3), ([5, 6, 7, 9, 12, 4, 31, 8], 5), ([3, 4, 5, 6], 2))
]


UNEVEN = [  # passes are parted where lengths jump so; one prompt is known from the texts above
    TEXTS[1],
    Rendered("", (*range(3, 31), *range(3, 25), 6, 8), 50, ()),
    Rendered("", (4, 7, 3, *range(30, 3, -1), *range(5, 31)), 3, ()),
    Rendered("", (4, 7, 3, 8), 3, ()),
]


BEGUN = (9, 4, 7, 5, 30, 6, 11, 12, 3)  # what all prompts begin with is read once


OTHER = (8, 3, 3, 9, 14, 6, 2, 21, 4, 17, 5, 13)  # or what some begin with


def begun(texts: list[Rendered], *systems: tuple[int, ...]) -> list[Rendered]:
    """The texts behind one beginning, or behind several in turn."""
    each = zip(itertools.cycle(systems or (BEGUN,)), texts, strict=False)
    return [Rendered("", (*system, *one.ids), len(system) + one.prompt_length, ()) for system, one in each]


def predicted(model: Any, vector: Any, strength: float, setup: Setup, texts: list[Rendered] = TEXTS) -> list[Tensor]:
    """By text the logits [t, v] of its answer."""
    found = {one.row: one.logits for one in setup.trial(vector, strength).answers(texts)}
    return [found[row] for row in range(len(texts))]


@pytest.mark.parametrize("name", [*FAMILIES, *FURTHER])
def test_answers_behind_kept_prompts_get_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family(name).eval()
    if find_decoder(model).model_type == "rwkv":
        return  # several rows with a state are refused
    vector = vector_for(model, scope="response", site=Site(2))
    kept = Setup(model, byte_tokenizer(), DATA)
    two = begun([*TEXTS, *TEXTS[::-1]], BEGUN, OTHER)
    asked = [(TEXTS, 1.0), (TEXTS, -0.5), (begun(TEXTS), -0.5), (two, 1.0), (two, -0.5), (UNEVEN, 1.0), (TEXTS, 1.0)]
    mine = [predicted(model, vector, strength, kept, texts) for texts, strength in asked]
    monkeypatch.setattr("steerkit.evaluate.answer_passes.AnswerPasses._behind_prompts", lambda *_: None)
    monkeypatch.setattr("steerkit.steering.kept_blocks.can_spare", lambda *_: False)
    for one, (texts, strength) in zip(mine, asked, strict=True):
        plain = predicted(model, vector, strength, Setup(model, byte_tokenizer(), DATA), texts)
        for here, there in zip(one, plain, strict=True):
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def shapes(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the ids of all passes."""
    found: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, given: found.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    yield found
    handle.remove()


def test_what_all_prompts_begin_with_is_read_once() -> None:
    model = family("llama").eval()
    setup, vector = Setup(model, byte_tokenizer(), DATA), vector_for(model, scope="response", site=Site(2))
    with shapes(model) as sizes:
        predicted(model, vector, 1.0, setup, begun(TEXTS))
        predicted(model, vector, 1.0, setup, [replace(one, ids=(*one.ids, 9)) for one in reversed(begun(TEXTS))])
    # The beginning, the prompts without it and without their last tokens, the answers; the second time these alone.
    assert sizes == [(1, 9), (3, 4), (3, 3), (3, 4)]


def test_what_some_begin_with_and_others_do_not_is_read_once_each() -> None:
    model = family("llama").eval()
    setup, vector = Setup(model, byte_tokenizer(), DATA), vector_for(model, scope="response", site=Site(2))
    with shapes(model) as sizes:
        predicted(model, vector, 1.0, setup, begun([*TEXTS, *TEXTS[::-1]], BEGUN, OTHER))
    assert sorted(sizes) == [(1, 9), (1, 12), (6, 3), (6, 4)]


def test_each_prompt_is_read_once_whatever_batches_it_stands_in() -> None:
    model = family("llama").eval()
    setup, vector = Setup(model, byte_tokenizer(), DATA), vector_for(model, scope="response", site=Site(2))
    with shapes(model) as sizes:
        predicted(model, vector, 1.0, setup)
        predicted(model, vector, 1.0, setup, UNEVEN)
    # Three prompts, three answers; then the long answer and the short ones, the long prompt in a pass of its own.
    assert sizes[:2] == [(3, 4), (3, 3)]
    assert sorted(sizes[2:]) == [(1, 2), (1, 49), (1, 53), (3, 3)]


def test_prompts_of_a_model_with_windows_are_read_once_too() -> None:
    model = family("gemma3_text").eval()
    setup, vector = Setup(model, byte_tokenizer(), DATA), vector_for(model, scope="response", site=Site(2))
    with shapes(model) as sizes:
        predicted(model, vector, 1.0, setup)
    assert sizes == [(3, 4), (3, 3)], "the pass that tells of the windows is the one that is kept"


def test_what_the_unsteered_model_ran_through_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, columns = family("llama").eval(), Counter[int]()
    attention = type(model.model.layers[0].self_attn)
    plain = attention.forward

    def counted(self: Any, *args: Any, **given: Any) -> Any:
        columns[self.layer_idx] += given["hidden_states"].shape[1]
        return plain(self, *args, **given)

    def setup() -> Setup:
        return Setup(model, byte_tokenizer(), DATA, neutral=DATA.positive)

    def score() -> None:
        Divergence().score(setup().trial(vector_for(model, scope="response", site=Site(2)), 1.0))

    score()  # whether a family allows it is found out in passes of its own
    monkeypatch.setattr(attention, "forward", counted)
    score()
    answers = max(len(one.ids) - one.prompt_length for one in calm_texts(setup()))
    assert columns[0] == columns[2] == columns[3] - answers


@pytest.mark.parametrize(
    ("scope", "is_kept"), [("response", True), ("generated", True), ("all", False), ("first(1)", False)]
)
def test_prompts_are_kept_where_the_scope_leaves_them_alone(scope: str, is_kept: bool) -> None:
    model = family("llama").eval()
    setup = Setup(model, byte_tokenizer(), DATA)
    predicted(model, vector_for(model, scope=scope, site=Site(2)), 1.0, setup)
    assert bool(setup.read._kept) == is_kept


def test_prompts_that_have_no_room_are_not_read_again() -> None:
    model = family("llama").eval()
    setup = Setup(model, byte_tokenizer(), DATA)
    setup.read.budget = 0
    vector = vector_for(model, scope="response", site=Site(2))
    passes: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    for _ in range(3):
        predicted(model, vector, 1.0, setup)
    handle.remove()
    assert len(passes) == 3 + 1


def test_scores_are_those_of_whole_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama").eval()
    vector = vector_for(model, scope="response", site=Site(2))
    setup = Setup(model, byte_tokenizer(), DATA, neutral=DATA.positive)
    found = [setup.trial(vector, strength) for strength in (1.0, 2.0, 1.0)]
    scores = [(PreferenceMargin().score(one), Divergence().score(one)) for one in found]
    monkeypatch.setattr("steerkit.steering.kept_blocks.can_spare", lambda *_: False)
    plain = Setup(model, byte_tokenizer(), DATA, neutral=DATA.positive)
    for (margin, cost), strength in zip(scores, (1.0, 2.0, 1.0), strict=True):
        trial = plain.trial(vector, strength)
        assert torch.equal(margin["preference_margin"], PreferenceMargin().score(trial)["preference_margin"])
        assert torch.equal(cost["kl"].values, Divergence().score(trial)["kl"].values)
