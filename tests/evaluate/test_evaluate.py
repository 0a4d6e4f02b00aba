"""Scores, intervals, the effect by strength, its picture and the card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit
from steerkit.errors import DataError, SteerError
from steerkit.evaluate.curve import Curve, random_like, strength_response
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.scorers.preference_margin import PreferenceMargin
from steerkit.evaluate.scoring import Measured, measure
from steerkit.evaluate.setup import Setup
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.report.card import Answer, vector_card
from tests import modes
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

ITEMS = [
    ("How was it?", "It was a fine day.", "It was a bad day."),
    ("And the food, tell me?", "Good.", "Not good at all, I fear."),
    ("Well?", "Yes, very well indeed.", "No."),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(CHATML)


def slow_margin(model: Any, tokenizer: Any, vector: Any, strength: float) -> list[float]:
    """One text at a time, one token at a time, from the definition."""
    margins = []
    for prompt, *answers in ITEMS:
        means = []
        for answer in answers:
            text = render(tokenizer, Conversation(prompt, answer=answer))
            with steerkit.steer(model, vector, strength, prompt_lengths=[text.prompt_length]):
                logits = modes.plain_logits(model, text.ids)
            logs = []
            for place in range(text.prompt_length, len(text.ids)):
                row = logits[place - 1].double()
                logs.append(float(row[text.ids[place]] - torch.logsumexp(row, dim=0)))
            means.append(sum(logs) / len(logs))
        margins.append(means[0] - means[1])
    return margins


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_preference_margin_is_its_definition(family: str, batch_size: int, tokenizer: Any) -> None:
    model = build(family)
    vector = modes.vector_for(model, scope="response")
    data = ContrastSet.from_answers(ITEMS)
    setup = Setup(model, tokenizer, data, batch_size=batch_size)
    got = PreferenceMargin().score(setup.trial(vector, 0.5))["preference_margin"]
    expected = torch.tensor(slow_margin(model, tokenizer, vector, 0.5))
    assert torch.allclose(got, expected, atol=1e-4)
    baseline = PreferenceMargin().score(setup.baseline)["preference_margin"]
    assert not torch.allclose(got, baseline, atol=1e-3)


def test_preference_margin_wants_two_answers(tokenizer: Any) -> None:
    model = build("llama")
    with pytest.raises(DataError, match="item 0 has no two answers"):
        measure(Setup(model, tokenizer, ContrastSet.from_prompts(["a b"], ["c d"])).baseline)


def test_effect_by_strength(tokenizer: Any) -> None:
    model = build("llama")
    vector = modes.vector_for(model, scope="response", size=0.5)
    steps: list[int] = []
    curve = strength_response(
        Setup(model, tokenizer, ContrastSet.from_answers(ITEMS)),
        vector,
        [-1.0, 0.0, 1.0],
        controls=2,
        step=lambda: steps.append(1),
    )
    assert curve.items == 3
    assert len(steps) == 3 * 3
    # Strength 0 is the baseline model, whatever the direction.
    assert [control[0.0] for control in curve.controls] == pytest.approx([curve.effects[1].mean] * 2, rel=1e-5)
    assert len({curve.effects[0].mean, curve.effects[2].mean, *(control[1.0] for control in curve.controls)}) == 4


def curve_of(means: tuple[float, ...], *controls: tuple[float, ...]) -> Curve:
    strengths = tuple(float(place) for place in range(-(len(means) // 2), len(means) - len(means) // 2))
    column = PreferenceMargin.columns["preference_margin"]
    points = tuple(
        {"preference_margin": Measured(column, Estimate(mean, mean - 0.1, mean + 0.1), None, 5)} for mean in means
    )
    return Curve(
        "preference_margin", strengths, points, tuple(dict(zip(strengths, one, strict=True)) for one in controls), 5
    )


def test_what_a_curve_says() -> None:
    curve = curve_of((-1, 0, 1), (0.0, 0.0, 0.0))
    assert curve.rises
    assert curve.clear_of_controls
    assert not curve_of((-1, 1, 1), (0.0, 0.0, 0.0)).rises
    assert not curve_of((-1, 0, 1), (0.0, 0.0, 0.95)).clear_of_controls
    assert not curve_of((-1, 0, 1), (0.0, 0.0, 3.0)).clear_of_controls, "beyond is not clear"
    assert [row["strength"] for row in curve.as_rows()] == [-1.0, 0.0, 1.0]
    assert dataclasses.replace(curve, controls=({1.0: 0.5},)).clear_of_controls, "an end without control is not judged"
    assert not dataclasses.replace(curve, controls=({1.0: 0.95},)).clear_of_controls
    # Items that differ much among themselves, and all of which steering moves alike.
    column = PreferenceMargin.columns["preference_margin"]
    wide = tuple(
        {
            "preference_margin": Measured(
                column, Estimate(mean, mean - 5, mean + 5), Estimate(mean, mean - 0.1, mean + 0.1), 5
            )
        }
        for mean in (-1.0, 0.0, 1.0)
    )
    assert dataclasses.replace(curve, points=wide, controls=({-1.0: -0.5, 1.0: 0.5},)).clear_of_controls
    assert not dataclasses.replace(curve, points=wide, controls=({-1.0: -0.5, 1.0: 0.95},)).clear_of_controls


def test_a_random_vector_has_the_same_norms_and_another_direction() -> None:
    vector = modes.vector_for(build("llama"), scope="response")
    name = "resid_post.1/direction"
    other = random_like(vector, seed=1)
    assert float(other.tensors[name].norm()) == pytest.approx(float(vector.tensors[name].norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(other.tensors[name], vector.tensors[name], dim=0))) < 0.6
    assert torch.equal(random_like(vector, seed=1).tensors[name], other.tensors[name])
    two = dataclasses.replace(
        vector,
        sites=(modes.Site(1), modes.Site(2)),
        tensors={name: vector.tensors[name], name.replace("1", "2"): vector.tensors[name]},
    )
    draws = [tensor for seed in range(3) for tensor in random_like(two, seed=seed).tensors.values()]
    assert len({round(float(draw[0]), 6) for draw in draws}) == len(draws), "no draw is used twice"
    window = modes.vector_for(build("llama"), scope="front")
    rows = random_like(window, seed=1).tensors[name]
    assert torch.allclose(rows.norm(dim=-1), window.tensors[name].norm(dim=-1))


def test_the_picture_is_written_and_errors_are_ours(tmp_path: Path) -> None:
    from steerkit.report.plots.curves import plot_curve

    curve = curve_of((0.0, 1.0), (0.0, 0.0))
    path = plot_curve(curve, tmp_path / "deep" / "curve.png", title="a title")
    assert path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SteerError, match="cannot be written"):
        plot_curve(curve, tmp_path / "file" / "curve.png", title="a title")


def test_the_card_says_what_is_needed() -> None:
    model = build("llama")
    vector = dataclasses.replace(
        modes.vector_for(model, scope="response"), suggested_strength=1.5, data_digest="ab" * 32
    )
    curve = curve_of((0.0, 1.0), (0.1, 0.2))
    answers = [Answer("How are you?", 0.0, "Well.\nThanks."), Answer("How are you?", 1.5, "Great!")]
    card = vector_card("joy-caa", vector, curve=curve, answers=answers, new_tokens=40)
    for part in (
        "joy-caa",
        "resid_post.1",
        "1.5",
        "Well. Thanks.",
        "Great!",
        vector.digest[:16],
        "abab",
        "0.10 to 0.10",
    ):
        assert part in card, part


def test_a_method_s_subject_and_a_trial_read_alike_under_a_vector(tokenizer: Any) -> None:
    """One text at a time with its own prompt length is what both give, in the order of the items."""
    from steerkit.fitting.subject import ModelSubject
    from steerkit.network.decoder import find_decoder
    from steerkit.network.sites import Site

    model = build("llama")
    vector, data = modes.vector_for(model, scope="response", size=0.5), ContrastSet.from_answers(ITEMS)
    items = [Conversation(prompt, answer=answer) for prompt, answer, _ in ITEMS]
    sites = [Site(3)]
    subject = ModelSubject(model, tokenizer, data, find_decoder(model), 2, None)
    found = subject.record(items, sites, readout="last", under=vector)[Site(3)]
    setup = Setup(model, tokenizer, data, batch_size=2)
    rendered = [render(tokenizer, item) for item in items]
    assert torch.equal(found, setup.trial(vector).record(rendered, sites, readout="last")[Site(3)])
    for row, text in enumerate(rendered):
        with steerkit.steer(model, vector, prompt_lengths=[text.prompt_length]):
            alone = steerkit.record(model, tokenizer, [text], sites, readout="last")[Site(3)][0]
        assert torch.allclose(found[row], alone, atol=1e-5)
    assert not torch.allclose(found, subject.record(items, sites, readout="last")[Site(3)], atol=1e-3)
