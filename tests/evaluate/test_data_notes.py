"""What is told of a contrast set before it is fitted on, and how often chance alone says so."""

from __future__ import annotations

import random
from typing import Any

import pytest

from steerkit.evaluate.data_notes import confound_notes, data_notes
from steerkit.prompts.contrast_set import ContrastSet
from tests.program import Cli
from tests.tiny_tokenizers import byte_tokenizer

WORDS = (
    "river",
    "lamp",
    "quiet",
    "seven",
    "paper",
    "under",
    "green",
    "walk",
    "the",
    "a",
    "old",
    "slowly",
    "bread",
    "sky",
)
ENDS = (".", ".", ".", "!", "?", "")


def sentence(draw: random.Random) -> str:
    words = [draw.choice(WORDS) for _ in range(draw.randint(3, 12))]
    words[0] = draw.choice((words[0], words[0].capitalize()))
    return draw.choice(("", "", "- ")) + " ".join(words) + draw.choice(ENDS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(None)


def test_clean_data_has_nothing_to_tell() -> None:
    assert data_notes(ContrastSet.from_answers([(f"q{n}", f"yes {n}", f"no {n}") for n in range(8)])) == []
    # Four answers to each question are no repetition.
    assert data_notes(ContrastSet.from_answers([(f"q{n % 2}", f"yes {n}", f"no {n}") for n in range(8)])) == []


def test_repeated_items_equal_sides_and_a_single_pair_are_told_once_each() -> None:
    rows = [(f"q{n % 6}", f"yes {n % 6}", f"no {n}") for n in range(8)] + [("same", "x", "x"), ("too", "y", "y")]
    repeated, equal = data_notes(ContrastSet.from_answers(rows))
    assert repeated.startswith("2 of 10 positive items repeat another of their side")
    assert equal.startswith("pairs 9, 10 of 10: both sides are equal, so nothing is learnt there")
    (single,) = data_notes(ContrastSet.from_prompts(["Love"], ["Hate"]))
    assert single.startswith("one pair only")
    assert data_notes(ContrastSet.from_prompts(["Love"], ["Hate"]), fewest=1) == []
    many = ContrastSet.from_prompts(["a"] * 12, ["a"] * 11 + ["b"])
    assert "pairs 1, 2, 3, 4, 5 and 6 more of 12" in data_notes(many)[1]


def test_length_and_ending_that_predict_the_label_are_told(tokenizer: Any) -> None:
    draw = random.Random(0)
    pairs = [(f"q{n}", sentence(draw).rstrip(".!?") + ".", sentence(draw).rstrip(".!?") + "!") for n in range(24)]
    assert any("full stop" in note for note in confound_notes(tokenizer, ContrastSet.from_answers(pairs)))
    pairs = [(f"q{n}", (said := sentence(draw)) + " and " + sentence(draw), said) for n in range(24)]
    assert any(
        note.startswith("length alone predicts the label")
        for note in confound_notes(tokenizer, ContrastSet.from_answers(pairs))
    )
    # A long set is looked at in part, and all over it.
    long = ContrastSet.from_prompts([f"{n}!" for n in range(600)], [f"{n} no." for n in range(500)])
    assert confound_notes(tokenizer, long)


def alarms(tokenizer: Any, sets: int, pairs: int, *, paired: bool) -> int:
    draw, found = random.Random(1), 0
    for _ in range(sets):
        sides = [[sentence(draw) for _ in range(pairs)] for _ in range(2)]
        found += bool(confound_notes(tokenizer, ContrastSet.from_prompts(*sides, paired=paired)))
    return found


def test_two_dozen_honest_pairs_raise_no_alarm(tokenizer: Any) -> None:
    assert alarms(tokenizer, 6, 24, paired=True) + alarms(tokenizer, 4, 24, paired=False) == 0


@pytest.mark.slow
@pytest.mark.parametrize("paired", [True, False])
def test_fewer_than_two_of_a_hundred_honest_sets_raise_an_alarm(tokenizer: Any, paired: bool) -> None:
    assert alarms(tokenizer, 300, 24, paired=paired) < 6


@pytest.mark.filterwarnings("default")
def test_extract_tells_it_on_stderr_once_each(cli: Cli, here: Any, tiny: Any) -> None:
    (here / "p.txt").write_text("\n".join(f"I love {word}" for word in (*"abcdefghijklmno", "a", "same")))
    (here / "n.txt").write_text(
        "\n".join(f"I hate {word} so very much" for word in "abcdefghijklmnop") + "\nI love same"
    )
    ended = cli(
        "extract",
        "--positive",
        "p.txt",
        "--negative",
        "n.txt",
        "--model",
        tiny,
        "--layers",
        1,
        "--out",
        "v.safetensors",
    )
    told = [line for line in ended.err.splitlines() if line.startswith("warning: ")]
    assert ended.code == 0
    assert len(told) == len(set(told))
    for words in ("1 of 17 positive items repeat", "pair 17 of 17: both sides are equal", "alone predicts the label"):
        assert sum(words in line for line in told) >= 1, (words, ended.err)


def test_the_end_of_whole_answers_is_told_and_of_letters_is_not() -> None:
    from steerkit.evaluate.data_notes import readout_note

    told = "I would go there at once and stay."
    long = ContrastSet.from_answers([("Shall I?", told, "I would never go there at all, no.")] * 3)
    short = ContrastSet.from_answers([("Shall I? (A) yes (B) no", "(A)", "(B)")] * 3)
    note = readout_note(long, "last")
    assert note is not None
    assert "--readout response_mean" in note
    assert readout_note(long, "response_mean") is None
    assert readout_note(short, "last") is None
