"""Massive tokens beyond the first: they leave the means only where that is asked for, text by text and site by site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.activations.readout import Readout
from steerkit.activations.recording import record, record_ids
from steerkit.activations.streaming import stream
from steerkit.errors import DataError
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.rendering import render
from tests.families import build
from tests.tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
SITE = Site(0)
TEXTS = ["so it # is, And", "nothing here", "a# b# c# d#", "########"]
DATA = ContrastSet.from_answers([("Well?", "fine# I say", "bad, I say"), ("And?", "good# yes", "no# no# no")])


@pytest.fixture(scope="module")
def model() -> Any:
    """A model in which hash signs are massive from the first block on."""
    found = build("llama")
    stop = TOKENIZER("#", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        found.get_input_embeddings().weight[stop] *= 500.0
    return found


def ordinary(rows: Tensor, read: list[int]) -> list[int]:
    """The tokens read that are no more than ten times as long as the median of all behind the first."""
    norms = [float(row.norm()) for row in rows]
    others = sorted(norms[1:])
    median = others[(len(others) - 1) // 2]
    kept = [place for place in read if norms[place] <= 10 * median]
    return kept or read


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_massive_tokens_leave_the_mean(model: Any, batch_size: int, side: Any) -> None:
    rendered = [render(TOKENIZER, text) for text in map(steerkit.Conversation, TEXTS)]
    found = record(
        model, TOKENIZER, TEXTS, [SITE], readout="mean,no_massive_tokens", batch_size=batch_size, padding_side=side
    )
    plain = record(model, TOKENIZER, TEXTS, [SITE], readout="mean")
    tokens = record_ids(model, [text.ids for text in rendered], [SITE])[SITE]
    left_out = 0
    for row, states in enumerate(tokens):
        read = list(range(1, len(states)))
        kept = ordinary(states, read)
        left_out += len(read) - len(kept)
        assert torch.allclose(found[SITE][row], states[kept].mean(0), atol=1e-5)
    assert left_out > 2
    assert found.scales[SITE].left_out == left_out
    assert plain.scales[SITE].left_out == 0
    assert found.readout == "mean,no_massive_tokens"
    assert torch.allclose(found[SITE][1], plain[SITE][1], atol=1e-6)
    assert not torch.allclose(found[SITE][0], plain[SITE][0], atol=1e-2)
    # Norms and spreads are those of what is left.
    assert float(found.scales[SITE].deviation.norm()) < 0.2 * float(plain.scales[SITE].deviation.norm())


def test_a_fit_reports_how_many_and_keeps_the_readout(model: Any) -> None:
    readout = "response_mean,no_massive_tokens"
    vector = steerkit.fit(model, TOKENIZER, DATA, layers=[0, 2], readout=readout)
    acts = record(model, TOKENIZER, DATA, [0, 2], readout=readout)
    assert vector.readout == readout
    assert vector.extra["massive_tokens_left_out"] == {str(site): acts.scales[site].left_out for site in acts.sites}
    assert acts.scales[Site(0)].left_out > 0
    expected = acts.positive[Site(0)].mean(0) - acts.negative[Site(0)].mean(0)
    assert torch.allclose(vector.params(Site(0))["direction"], expected, atol=1e-4)
    plain = steerkit.fit(model, TOKENIZER, DATA, layers=[0, 2], readout="response_mean")
    assert "massive_tokens_left_out" not in plain.extra
    again = steerkit.fit(model, TOKENIZER, DATA, layers=[0, 2], readout=Readout.parse(readout))  # type: ignore[arg-type]
    assert again == vector


def test_streams_leave_them_out_too(model: Any) -> None:
    from steerkit.activations.moments import Means

    readout = "response_mean,no_massive_tokens"
    streamed = stream(model, TOKENIZER, DATA, {SITE: Means()}, readout=readout)
    kept = record(model, TOKENIZER, DATA, [SITE], readout=readout)
    assert torch.allclose(streamed.positive[SITE][0], kept.positive[SITE].mean(0), atol=1e-5)
    assert streamed.scales[SITE].left_out == kept.scales[SITE].left_out > 0


def test_readouts_of_one_token_have_nothing_to_leave() -> None:
    assert str(Readout.parse("span(0, 3), no_massive_tokens")) == "span(0,3),no_massive_tokens"
    for name in ("last", "prompt_last", "index(2)"):
        with pytest.raises(DataError, match="is one token and no mean"):
            Readout.parse(f"{name},no_massive_tokens")
    with pytest.raises(DataError, match="means also with ,no_massive_tokens behind"):
        Readout.parse("mean,no_massive")
