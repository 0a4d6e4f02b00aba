"""Strengths at one cost: what is found costs what was wanted, measured the slow way, and what cannot be had says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steerkit
from benchmarks.equal_kl import CLOSE, Costs, Row, measured
from steerkit.evaluate.setup import Setup
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer(CHATML)
NEUTRAL = [Conversation("Where is it?", "Over there, I think."), Conversation("When?", "At noon.")]
DATA = steerkit.ContrastSet.from_answers(
    [("How is it?", "Fine and warm.", "Poor and cold."), ("And now?", "Good.", "Bad, alas."), ("Well?", "Yes!", "No!")]
)


def setup_of() -> Setup:
    return Setup(build("llama"), TOKENIZER, DATA, neutral=NEUTRAL)


def slow_kl(model: Any, vector: Any, strength: float) -> float:
    """Text by text, token by token, in float64."""
    found = []
    for item in NEUTRAL:
        text = render(TOKENIZER, item)
        ids = torch.tensor([text.ids])
        with torch.no_grad():
            plain = model(input_ids=ids).logits[0].double().log_softmax(-1)
            with steerkit.steer(model, vector, strength, prompt_lengths=[text.prompt_length]):
                steered = model(input_ids=ids).logits[0].double().log_softmax(-1)
        answer = slice(text.prompt_length - 1, len(text.ids) - 1)
        found += (plain.exp() * (plain - steered)).sum(-1)[answer].tolist()
    return sum(found) / len(found)


@pytest.mark.parametrize("method", ["caa", "transport"])
def test_a_strength_costs_what_was_wanted(method: str) -> None:
    setup = setup_of()
    vector = steerkit.fit(setup.model, TOKENIZER, DATA, method=method, layers=[1], readout="response_mean")
    costs, strengths = Costs(setup, vector), []
    for kl in (0.02, 0.1):
        found = costs.reaching(kl)
        assert not isinstance(found, str)
        assert slow_kl(setup.model, vector, found.strength) == pytest.approx(kl, rel=CLOSE + 1e-3)
        strengths.append(found.strength)
    assert 0 < strengths[0] < strengths[1]


def test_what_cannot_be_had_says_so() -> None:
    setup = setup_of()
    vector = steerkit.fit(setup.model, TOKENIZER, DATA, method="aura", layers=[3], readout="response_max")
    assert "none costs so much" in str(Costs(setup, vector).reaching(50.0))
    (row,) = measured(setup, "aura", vector, [50.0])
    assert row.reached is None
    assert len(row.cells()) == 6
    assert Row.from_json(row.as_json()) == row


def test_rows_are_compared_item_by_item() -> None:
    setup = setup_of()
    vector = steerkit.fit(setup.model, TOKENIZER, DATA, method="caa", layers=[1], readout="response_mean")
    (row,) = measured(setup, "caa", vector, [0.05])
    assert len(row.margins) == 3
    again = Row.from_json(row.as_json())
    assert again.margins == pytest.approx(row.margins, abs=1e-5)
    higher = Row("other", 0.05, row.reached, row.figures, tuple(margin + 0.25 for margin in row.margins))
    beside = higher.beside(row)
    assert beside is not None
    assert beside.mean == pytest.approx(0.25, abs=1e-6)
