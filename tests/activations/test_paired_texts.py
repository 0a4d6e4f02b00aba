"""Two texts in one row: the same activations as in rows of their own, in every family, or not used."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

import steerkit
from steerkit.activations.paired_texts import MASK_BYTES, PairedTexts
from steerkit.activations.recording import Activations, record
from steerkit.activations.streaming import stream
from steerkit.methods._registry import resolve
from steerkit.network.sites import Site
from steerkit.prompts.batching import Batch, batches
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.rendering import Rendered
from tests.families import FAMILIES, FURTHER, build
from tests.modes import vector_for
from tests.tiny_tokenizers import byte_tokenizer

family = lru_cache(maxsize=None)(build)
DATA = ContrastSet.from_answers(
    [("How is it going?", "Fine.", "Bad, alas."), ("And how is it now?", "Well, well.", "Ill."), ("So?", "Yes", "No")]
)
SITES = [Site(0), Site(2), Site(3)]
# Tiny models attend to few tokens; those that attend to all of a text take a tree.
TAKE_TREES = {"llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "mixtral", "olmo2", "opt", "phi", "phi3", "stablelm"}


class Columns:
    """Counts the tokens that run through a model's first block, pads included."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        body = model.get_decoder() if hasattr(model, "get_decoder") else model
        self._handle = body.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: nn.Module, _args: Any, inputs: Any) -> None:
        self.count += inputs["input_ids"].numel()

    def __enter__(self) -> Columns:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def read(model: Any, readout: str = "response_mean", **options: Any) -> Activations:
    return record(model, byte_tokenizer(), DATA, SITES, readout=readout, **options)


def plain(model: Any, monkeypatch: pytest.MonkeyPatch, readout: str = "response_mean") -> Activations:
    with monkeypatch.context() as patch:
        patch.setattr("steerkit.activations.reading.paired", lambda *_: None)
        return read(model, readout)


def assert_close(mine: Activations, other: Activations) -> None:
    for site in SITES:
        for side in ("positive", "negative"):
            one, another = getattr(mine, side)[site], getattr(other, side)[site]
            assert float((one - another).norm()) <= 1e-4 * float(another.norm()), (site, side)
        assert mine.scales[site].norm == pytest.approx(other.scales[site].norm, rel=1e-4)


@pytest.mark.parametrize("name", [*FAMILIES, *FURTHER])
def test_the_same_activations_as_in_rows_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family(name).eval()
    mine = read(model)
    assert_close(mine, plain(model, monkeypatch))
    with Columns(model) as alone:
        plain(model, monkeypatch)
    with Columns(model) as together:
        read(model)
    assert together.count <= alone.count
    if name in TAKE_TREES:
        assert together.count < 0.8 * alone.count


@pytest.mark.parametrize("readout", ["last", "mean", "prompt_mean", "answer_mean", "prompt_last"])
def test_every_readout(readout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama").eval()
    assert_close(read(model, readout), plain(model, monkeypatch, readout))


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_half_precision_and_every_kind_of_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").eval().to(torch.bfloat16)
    model.set_attn_implementation(kind)
    mine, other = read(model), plain(model, monkeypatch)
    with Columns(model) as together:
        read(model)
    with Columns(model) as alone:
        plain(model, monkeypatch)
    assert together.count < 0.8 * alone.count
    for site in SITES:
        assert float((mine[site] - other[site]).norm()) <= 0.02 * float(other[site].norm())


def test_streamed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama").eval()

    def found() -> Any:
        sums = {site: resolve("caa")().statistics(site) for site in SITES}
        return stream(model, byte_tokenizer(), DATA, sums, readout="response_mean")  # type: ignore[arg-type]

    with Columns(model) as together:
        mine = found()
    monkeypatch.setattr("steerkit.activations.reading.paired", lambda *_: None)
    with Columns(model) as alone:
        other = found()
    assert together.count < 0.8 * alone.count
    assert_close(mine, other)


def test_a_steered_model_reads_every_text_in_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama").eval()
    with steerkit.steer(model, vector_for(model, scope="all", site=Site(1)), 2.0):
        mine, other = read(model), plain(model, monkeypatch)
    assert all(torch.equal(mine[site], other[site]) for site in SITES)


def packed(first: list[int], second: list[int]) -> tuple[Batch, PairedTexts | None]:
    texts = [Rendered("", tuple(ids), 1, ()) for ids in (first, second)]
    batch = batches(texts, 2, pad_id=0, groups=2)[0]
    return batch, PairedTexts.of(batch)


@pytest.mark.parametrize("swapped", [False, True])
def test_what_a_token_sees(swapped: bool) -> None:
    """By the definition: its own text up to itself; the row is the same whichever of the two is given first."""
    first, second = [5, 6, 7, 1, 9], [5, 6, 7, 8]
    _, tree = packed(*((second, first) if swapped else (first, second)))
    assert tree is not None
    assert tree.input_ids.tolist() == [[5, 6, 7, 1, 9, 8]]
    assert tree.positions.tolist() == [[0, 1, 2, 3, 4, 3]]
    for text, places in ((first, [0, 1, 2, 3, 4]), (second, [0, 1, 2, 5])):
        for number, place in enumerate(places):
            seen = tree.allowed[0, 0, place].nonzero()[:, 0].tolist()
            assert seen == places[: number + 1]
            assert tree.input_ids[0, place] == text[number]
    values = torch.arange(6.0).reshape(1, 6, 1)
    one, two = tree.unpack(values)[:, :, 0].flip(0) if swapped else tree.unpack(values)[:, :, 0]
    assert one.tolist() == [0, 1, 2, 3, 4]
    assert two[:4].tolist() == [0, 1, 2, 5]


def test_where_it_saves_nothing_rows_stay_as_they_are() -> None:
    assert packed([5, 6, 7, 8], [1, 2, 3, 4])[1] is None
    assert packed(list(range(1, 11)), [1, *range(12, 21)])[1] is None
    long = list(range(1, 1 + int((MASK_BYTES / 4) ** 0.5)))
    assert packed([*long, 1], [*long, 2])[1] is None, "the mask would be too large"
