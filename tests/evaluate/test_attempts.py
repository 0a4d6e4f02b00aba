"""Attempts inside of one answer: where texts are cut, and what is said of the pieces with a judge and without one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from steerkit.errors import DataError, SteerError
from steerkit.evaluate.scorers.attempts import FRESH, QUALITY, Attempts, attempts
from steerkit.evaluate.scorers.compliance import relevance
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.trial import Trial
from steerkit.prompts.conversation import Conversation
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

BOATS = "Boats are made of wood and tar by the sea."
LACES = "You cross the laces and pull the loop through."

CUT = [
    f"{BOATS} Wait, that is not what you asked. {LACES}",
    f"{BOATS} Let me start over. {LACES}",
    f"{BOATS}\nSorry, I got off track. {LACES}",
    f"{BOATS} Oops, let me try that again. {LACES}",
    f"{BOATS}\n\nActually, let\u2019s go back to the shoes. {LACES}",
    f"{BOATS} I apologize, that was wrong. {LACES}",
    f"{BOATS} I got a bit sidetracked there. {LACES}",
    f"{BOATS} That's not right. {LACES}",
    f"{BOATS} Back to your question about shoes. {LACES}",
    f"{BOATS} On second thought, forget the boats. {LACES}",
    f"{BOATS} Here is a better answer: {LACES}",
]
WHOLE = [
    f"{BOATS} {LACES}",
    f"{BOATS} They wait for you. {LACES}",
    f"{BOATS} Let me show you how. {LACES}",
    f"Wait, I know this one well. {LACES}",
    f"{BOATS} Then start over with the second shoe. {LACES}",
    f"{BOATS} I am sorry for your loss. {LACES}",
    f"{BOATS} Waiting is half of it. {LACES}",
    f"{BOATS} Let me start over.",  # announced, not made
    f"Well. Wait, let me try again. {LACES}",  # nothing before it
    "",
]


@pytest.mark.parametrize("text", CUT)
def test_a_sentence_of_a_fresh_start_cuts(text: str) -> None:
    first, second = attempts(text)
    assert (first, LACES in second) == (BOATS, True)


@pytest.mark.parametrize("text", WHOLE)
def test_other_sentences_do_not(text: str) -> None:
    (whole,) = attempts(text)
    assert whole.split() == text.split()


def test_three_attempts_and_two_markers_in_a_row() -> None:
    found = attempts(f"{BOATS} Wait. Let me start over. {LACES} Hold on, that is not it either. {LACES}")
    assert [one.split()[0] for one in found] == ["Boats", "Wait.", "Hold"]


class Reader:
    """A judge that reads its prompts: laces are an answer, boats are none, and a start with `Wait` is a fresh one."""

    name = "reader"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def score(self, prompts: Sequence[str], *, low: int = 0, high: int = 10) -> list[float | None]:
        self.asked += prompts
        return [self._one(prompt, high) for prompt in prompts]

    @staticmethod
    def _one(prompt: str, high: int) -> float | None:
        if "unreadable" in prompt:
            return None
        if prompt.startswith(FRESH[:20]):
            return float("> Wait" in prompt)
        assert prompt.startswith(QUALITY[:20])
        return float(high) if "laces" in prompt.partition("Text:")[2] else 0.0


@pytest.fixture(scope="module")
def setup() -> Setup:
    asked = [Conversation(f"How do I tie {n} shoes?") for n in range(6)]
    return Setup(build("llama"), byte_tokenizer(CHATML), prompts=asked, max_new_tokens=4, texts=6)


def saying(setup: Setup, *texts: str) -> Trial:
    trial = setup.trial(None)
    made = Trial(trial.setup, None, None, None, None)
    vars(made)["texts"] = texts
    return made


def test_with_a_judge(setup: Setup) -> None:
    judge = Reader()
    texts = (
        f"{BOATS} Wait, that is wrong of me. {LACES}",  # corrects itself
        f"{LACES} Wait, that is wrong of me. {BOATS}",  # begins anew and does worse
        f"{BOATS} Let me start over. {LACES}",  # the judge does not take it for a fresh start
        BOATS,
        "",
        f"{BOATS} Wait, that is an unreadable one. {LACES}",
    )
    found = Attempts(judge).score(saying(setup, *texts))
    assert found["multi_attempt"].tolist()[:4] == [1.0, 1.0, 0.0, 0.0]
    assert found["self_correction"].tolist()[:4] == [1.0, 0.0, 0.0, 0.0]
    assert found["first_attempt"].tolist()[:4] == [0.0, 1.0, 1.0, 0.0]
    assert found["last_attempt"].tolist()[:4] == [1.0, 0.0, 1.0, 0.0]
    assert found["gain"].tolist()[:4] == [1.0, -1.0, 0.0, 0.0]
    assert all(math.isnan(column[4]) for column in found.values())
    assert math.isnan(found["self_correction"][5])  # its text could not be rated at all
    assert len(judge.asked) == 4 + 2 + 2 + 1 + 1 + 1  # four cuts, then the first and the last attempt of each text


def test_without_a_judge_by_words_and_by_the_model(setup: Setup) -> None:
    texts = (f"{BOATS} Wait, that is wrong of me. {LACES}", BOATS, f"{LACES} Let me start over. Boats, {BOATS}")
    trial = saying(setup, *texts, "x", "y", "z")
    found = Attempts(markers=("boats",)).score(trial)
    assert found["self_correction"].tolist()[:3] == [1.0, 0.0, 0.0]
    assert found["first_attempt"][0] == pytest.approx(-100 / len(BOATS.split()))
    assert found["last_attempt"][0] == 0
    plain = Attempts().score(trial)
    asked = [setup.asked[0]] * 2
    first, last = relevance(setup, asked, attempts(texts[0])).tolist()
    assert plain["first_attempt"][0] == pytest.approx(first, abs=1e-5)
    assert plain["last_attempt"][0] == pytest.approx(last, abs=1e-5)
    assert plain["self_correction"][0] == float(last > first)
    assert plain["gain"][1] == 0
    empty = Attempts().score(saying(setup, *[""] * 6))
    assert torch.stack(list(empty.values())).isnan().all()


def test_what_is_refused() -> None:
    with pytest.raises(SteerError):
        Attempts(judge="  ")
    with pytest.raises(DataError):
        Attempts(markers=("",))
