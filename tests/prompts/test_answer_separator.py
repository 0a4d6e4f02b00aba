"""Without a chat template a stated separator stands between prompt and answer, and a vector remembers which."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import steerkit
from steerkit.errors import DataError
from steerkit.evaluate.controls import refits
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store_identity import setup_identity
from steerkit.fitting.held_out import separation
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.vector.steering_vector import SteeringVector
from tests.families import build
from tests.tiny_tokenizers import byte_tokenizer

PLAIN = byte_tokenizer(None, merges=False)
GLUED = {"answer_separator": ""}
DATA = ContrastSet.from_answers([(f"Is {n} nice?", f"Yes {n}.", f"No {n}!") for n in range(8)])


@pytest.mark.parametrize(
    ("item", "text", "start"),
    [
        (Conversation("Hi", answer="Ho"), "Hi\nHo", 3),
        (Conversation("Hi\n", answer="Ho"), "Hi\nHo", 3),
        (Conversation("Hi ", answer="Ho"), "Hi Ho", 3),
        (Conversation("Hi", answer=" Ho"), "Hi Ho", 2),
        (Conversation("Hi", answer="\n\nHo"), "Hi\n\nHo", 2),
        (Conversation("", answer="Ho"), "Ho", 0),
        (Conversation("Hi", answer="Ho", raw=True), "HiHo", 2),
        (Conversation("Hi"), "Hi", 2),
    ],
)
def test_one_line_break_stands_before_an_answer_unless_white_space_does(
    item: Conversation, text: str, start: int
) -> None:
    rendered = render(PLAIN, item)
    assert (rendered.text, rendered.answer_start) == (text, start)
    assert rendered.prompt_length == (1 + start if item.answer else len(rendered.ids))


def test_another_separator_can_be_stated_and_a_template_needs_none() -> None:
    item = Conversation("Hi", answer="Ho")
    for separator in ("", " ", "\n\nAnswer: "):
        rendered = render(PLAIN, item, chat_template_kwargs={"answer_separator": separator})
        assert rendered.text == f"Hi{separator}Ho"
    chat = byte_tokenizer()
    assert render(chat, item, chat_template_kwargs={"answer_separator": "?"}) == render(chat, item)
    with pytest.raises(DataError, match="answer_separator: give a text, such as a line break or '', got 3"):
        render(PLAIN, item, chat_template_kwargs={"answer_separator": 3})


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


def fitted(model: Any, tokenizer: Any = PLAIN, **options: Any) -> SteeringVector:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return steerkit.fit(model, tokenizer, DATA, layers=[1, 2], readout="response_mean", **options)


def test_a_fit_says_once_what_stands_there_and_the_file_keeps_it(model: Any) -> None:
    with pytest.warns(UserWarning, match=r"has no chat template: answers follow their prompts behind '\\n'") as told:
        vector = steerkit.fit(model, PLAIN, DATA, layers=[1], readout="response_mean")
    assert len(told) == 1
    assert SteeringVector.from_bytes(vector.to_bytes()).answer_separator == vector.answer_separator == "\n"
    assert fitted(model, chat_template_kwargs=GLUED).answer_separator == ""
    assert fitted(model, byte_tokenizer()).answer_separator is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to say of prompts alone, or of what is raw
        steerkit.fit(model, PLAIN, ContrastSet.from_prompts(["aa", "b"], ["cc", "d"]), layers=[1])
        raw = ContrastSet.from_answers([("a", "b", "c"), ("d", "e", "f")], raw=True)
        steerkit.fit(model, PLAIN, raw, layers=[1], readout="response_mean")


def test_a_vector_is_measured_and_read_with_the_separator_it_was_fitted_with(model: Any) -> None:
    glued, broken = fitted(model, chat_template_kwargs=GLUED), fitted(model)
    old = replace(glued, answer_separator=None)  # a file from before separators were kept
    assert not torch.equal(glued.tensors["resid_post.1/direction"], broken.tensors["resid_post.1/direction"])
    setup, stated = Setup(model, PLAIN, DATA), Setup(model, PLAIN, DATA, chat_template_kwargs=GLUED)
    texts = {name: setup.trial(one, 1.0).setup.pairs[0][0].text for name, one in (("new", broken), ("old", old))}
    assert texts == {"new": "Is 0 nice?\nYes 0.", "old": "Is 0 nice?Yes 0."}
    assert setup.trial(broken, 1.0).setup is setup
    assert setup.trial(old, 1.0).setup is setup.trial(glued, 1.0).setup
    with torch.no_grad():
        margins = [
            steerkit.measure(one.trial(old, 1.0), ["preference_margin"])["preference_margin"].estimate
            for one in (setup, stated)
        ]
    assert margins[0] == margins[1]
    assert setup_identity(setup) != setup_identity(stated)
    items = [{"prompt": "Is it?", "response": "Yes."}]
    scores = [
        float(steerkit.Monitor(model, PLAIN, glued, read="response_mean", calibrated=False, **more).score(items)[0])
        for more in ({}, {"chat_template_kwargs": GLUED}, {"chat_template_kwargs": {"answer_separator": "\n"}})
    ]
    assert scores[0] == scores[1] != scores[2]
    assert separation(model, PLAIN, DATA, old) == separation(model, PLAIN, DATA, old, chat_template_kwargs=GLUED)
    found = refits(model, PLAIN, DATA, replace(old, settings=glued.settings), shuffled=0, halves=0, resamples=0)
    assert all(value == pytest.approx(1.0) for value in found.reproduced.values())
