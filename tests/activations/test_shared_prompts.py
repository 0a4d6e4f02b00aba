"""Texts that begin alike, read in fewer tokens: the numbers of whole texts in every family, or read as whole texts."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

import steerkit
from steerkit.activations.moments import Means
from steerkit.activations.recording import Activations, record
from steerkit.activations.shared_prompts import may_share, stretches
from steerkit.activations.streaming import stream
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.batching import batches
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.rendering import Rendered
from tests import tolerances
from tests.families import BLOCKS, FAMILIES, FURTHER, build
from tests.modes import vector_for
from tests.tiny_tokenizers import CHATML, byte_tokenizer

family = lru_cache(maxsize=None)(build)
TOKENIZER = byte_tokenizer(CHATML)
BEGUN = (9, 4, 7, 5, 30, 6, 11, 12)


def texts(begun: tuple[int, ...] = BEGUN) -> list[Rendered]:
    """Two answers to each of three prompts, the last of which is all that the others begin with."""
    prompts = [(*begun, 7, 9), (*begun, 5, 6, 7, 21), (*begun, 3)]
    answers = [[(4, 30, 8), (12,)], [(31, 8), (6, 5, 4, 3, 22)], [(5, 6), (7, 7, 7, 8)]]
    return [
        Rendered("", (*prompt, *answer), len(prompt), ())
        for prompt, pair in zip(prompts, answers, strict=True)
        for answer in pair
    ]


def read(name: str, items: Any, readout: Any = "response_mean", **options: Any) -> Activations:
    sites = [Site(layer) for layer in range(BLOCKS)]
    return record(family(name).eval(), TOKENIZER, items, sites, readout=readout, **options)


def assert_same(one: Activations, other: Activations, rounding: float = 1e-5) -> None:
    assert one.sites == other.sites
    for site in one.sites:
        assert tolerances.gap(one[site], other[site]) <= rounding
        mine, its = one.scales[site], other.scales[site]
        assert mine.norm == pytest.approx(its.norm, rel=0.01)  # a bin's width
        torch.testing.assert_close(mine.deviation, its.deviation, rtol=1e-3, atol=1e-5)


OTHER = (8, 3, 3, 9, 14, 6, 2, 21, 4, 17, 5)
STRAY = (20, 4, 18, 6, 2, 9, 9, 3, 16, 25, 11, 1, 13)


def behind_two_systems() -> list[Rendered]:
    """Answers behind two system prompts of different lengths, in turn, and one behind a prompt like no other."""
    mixed = [one for pair in zip(texts(), texts(OTHER), strict=True) for one in pair]
    return [*mixed, Rendered("", (*STRAY, 7, 5), len(STRAY), ())]


@pytest.mark.parametrize("name", [*FAMILIES, *FURTHER])
def test_every_family_gives_the_numbers_of_whole_texts(name: str) -> None:
    if find_decoder(family(name)).model_type == "rwkv":
        return  # several rows with a state are refused
    for items in (texts(), behind_two_systems()):
        assert_same(read(name, items, shares=True), read(name, items), tolerances.of_family(name))


def test_most_families_share() -> None:
    assert sum(may_share(find_decoder(family(name).eval())) for name in FAMILIES) > len(FAMILIES) / 2


@pytest.mark.parametrize("readout", ["last", "mean", "prompt_last", "prompt_mean", "predicting_mean", 2, -3])
@pytest.mark.parametrize("begun", [BEGUN, (1,)])
def test_every_readout(readout: Any, begun: tuple[int, ...]) -> None:
    assert_same(read("llama", texts(begun), readout, shares=True), read("llama", texts(begun), readout))


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_batches_of_any_size(size: int) -> None:
    assert_same(read("llama", texts(), shares=True, batch_size=size), read("llama", texts()))


def test_running_sums_and_prompts_without_answers() -> None:
    model = family("llama").eval()
    sets = [
        ContrastSet.from_answers([(f"Is {n} so?", "Yes, it is.", "No.") for n in range(5)]),
        ContrastSet.from_prompts([f"I love number {n}" for n in range(5)], ["I hate it", "I hate that"]),
    ]
    for data in sets:
        one, other = (
            stream(model, TOKENIZER, data, {Site(1): Means(), Site(2): Means()}, readout="last", shares=shares)
            for shares in (True, False)
        )
        assert_same(one, other)


@pytest.mark.parametrize(
    ("items", "sizes"),
    [
        # What all begin with, the rest of the three prompts, the six answers; instead of six rows of 17 tokens.
        (texts(), [(1, 8), (3, 4), (6, 5)]),
        # Both beginnings, the rests of six prompts, twelve answers; instead of twelve rows of 20 tokens.
        (behind_two_systems()[:-1], [(2, 11), (6, 4), (12, 5)]),
    ],
    ids=["one system", "two systems"],
)
def test_columns_that_run(items: list[Rendered], sizes: list[tuple[int, int]]) -> None:
    (batch,) = batches(items, 16, pad_id=0)
    passes = stretches(batch, torch.device("cpu"))
    assert passes is not None
    for number, (one, size) in enumerate(zip(passes, sizes, strict=True)):
        assert tuple(one.ids.shape) == size
        tokens = sum(stop - start for start, stop in zip(one.starts, one.stops, strict=True))
        # A token counts for every text that it stands in, but for the first of a text.
        assert int(one.counted.sum()) == tokens - (len(items) if number == 0 else 0)
        for layer in range(2):  # as a pass would
            keys = torch.zeros(len(one.ids), 1, one.ids.shape[1], 4)
            one.past.update(keys, keys, layer)


def test_what_shares_too_little_is_read_as_whole_texts() -> None:
    apart = [Rendered("", (row, 3, 4, 5, 6), 3, ()) for row in range(4)]
    (batch,) = batches(apart, 16, pad_id=0)
    assert stretches(batch, torch.device("cpu")) is None


def test_a_steered_model_is_read_as_whole_texts() -> None:
    model = family("llama").eval()
    with steerkit.steer(model, vector_for(model, scope="all", site=Site(0)), 2.0):
        assert torch.equal(read("llama", texts(), shares=True)[Site(2)], read("llama", texts())[Site(2)])


@pytest.mark.parametrize("method", ["caa", "repe"])
def test_a_vector_is_fitted_in_fewer_tokens_unless_its_bits_matter(method: str) -> None:
    model: Any = family("llama").eval()
    pairs = [(f"Is {n} what they said it is?", "Yes, so it is.", "No.") for n in range(9)]
    data, held_out = ContrastSet.from_answers(pairs[:6]), ContrastSet.from_answers(pairs[6:])
    may_share(find_decoder(model))  # which takes a pass, once

    def fitted(**options: Any) -> tuple[torch.Tensor, int]:
        columns: list[int] = []
        handle = model.model.register_forward_pre_hook(
            lambda _module, _args, given: columns.append(given["input_ids"].numel()), with_kwargs=True
        )
        vector = steerkit.fit(model, TOKENIZER, data, method=method, layers=[2], held_out=held_out, **options)
        handle.remove()
        return vector.params(vector.sites[0])["direction"], sum(columns)

    shared, fewer = fitted()
    whole, columns = fitted(shares=False)
    assert fewer < 0.75 * columns
    assert tolerances.gap(shared, whole) <= 1e-5
    assert torch.equal(whole, fitted(shares=False, batch_size=16)[0])


@pytest.mark.parametrize("readout", ["prompt_last", "response_mean"])
def test_texts_that_begin_alike_share_a_pass_whatever_their_lengths(readout: str) -> None:
    """One system prompt a batch, not whichever lengths are next to one another."""
    model, columns = family("llama").eval(), []
    items = [
        Rendered("", (*system, 30 + length, *range(3, 3 + length), 7), len(system) + 1 + length, ())
        for length in range(1, 9)
        for system in (BEGUN, OTHER, STRAY)
    ]
    handle = model.model.register_forward_pre_hook(
        lambda _module, _args, given: columns.append(given["input_ids"].numel()), with_kwargs=True
    )
    found = read("llama", items, readout, shares=True, batch_size=8)
    handle.remove()
    assert_same(found, read("llama", items, readout))
    # Three beginnings, once each, instead of three in each of three batches; and 24 rests.
    assert sum(columns) < len(BEGUN) + len(OTHER) + len(STRAY) + 24 * (8 + 1) + 24 * 2
    assert sorted(columns[::3]) == sorted(map(len, (BEGUN, OTHER, STRAY)))
