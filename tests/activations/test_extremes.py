"""Readouts of the largest and the smallest values: what a loop over tokens finds, whatever stands on pads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steerkit.activations.readout import Readout
from steerkit.activations.recording import record
from steerkit.errors import DataError
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer(CHATML)
ITEMS = [Conversation("How is it?", "Fine."), Conversation("And the rest of it all?", "Well, it is as it ever was.")]
SITE = Site(1, "mlp_in")


@pytest.mark.parametrize("readout", ["max", "min", "response_max", "prompt_min", "answer_max,no_massive_tokens"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_they_are_what_a_loop_over_tokens_finds(readout: str, side: str) -> None:
    model = build("llama")
    tap = locate(model, [SITE])[SITE]

    def spoil(h: Tensor) -> Tensor:
        """Make pads not finite: id 0 is the pad's, and no token of the texts has it."""
        return h.masked_fill((ids[..., None] == 0) if ids.shape == h.shape[:2] else torch.tensor(False), torch.nan)

    ids = torch.empty(0, 0)

    def remember(_module: object, _args: object, kwargs: dict[str, Tensor]) -> None:
        nonlocal ids
        ids = kwargs["input_ids"]

    watching = model.model.register_forward_pre_hook(remember, with_kwargs=True)
    spoiling = tap.attach(spoil)
    found = record(model, TOKENIZER, ITEMS, [SITE], readout=readout, padding_side=side)  # type: ignore[arg-type]
    shared = record(model, TOKENIZER, ITEMS, [SITE], readout=readout, shares=True)
    spoiling.remove()
    watching.remove()
    assert found.readout == readout
    for row, item in enumerate(ITEMS):
        text = render(TOKENIZER, item)
        alone: list[Tensor] = []
        handle = tap.attach(lambda h, alone=alone: (alone.append(h[0].clone()), h)[1])
        with torch.no_grad():
            model(input_ids=torch.tensor([text.ids]))
        handle.remove()
        tokens = Readout.parse(readout).tokens(text)
        assert 0 not in tokens
        rows = torch.stack([alone[0][token] for token in tokens])
        wanted = rows.amax(0) if "max" in readout.partition(",")[0] else rows.amin(0)
        torch.testing.assert_close(found[SITE][row], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(shared[SITE][row], wanted, rtol=1e-4, atol=1e-5)


def test_names() -> None:
    for name in ("max", "min", "prompt_max", "predicting_min", "assistant_max", "share", "response_share"):
        assert str(Readout.parse(name)) == name
    assert str(Readout.parse("response_mean").pooled("max")) == "response_max"
    assert Readout.parse("mean").pooled("mean") == Readout.parse("mean")
    for name in ("last_max", "span_max", "prompt_last_min", "maximum", "_max"):
        with pytest.raises(DataError, match="for mean also max, min and share"):
            Readout.parse(name)
    for one in ("last", "span(0,3)", "index(-2)"):
        with pytest.raises(DataError, match="has no max"):
            Readout.parse(one).pooled("max")
