"""Splits: what asks the same stays together, everywhere where items are parted, and nothing else moves."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerkit.errors import DataError
from steerkit.evaluate.setup import Setup
from steerkit.methods._gated_addition import folds_of
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.likeness import groups_of, turns_of
from steerkit.prompts.splitting import half_of, known_items
from steerkit.recipe import find_recipe

fast = settings(
    max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def asked(data: ContrastSet) -> set[object]:
    return {item.prompt for side in data.sides for item in side}


def answers(questions: int, each: int) -> ContrastSet:
    return ContrastSet.from_answers(
        [(f"Question {q}?", f"Good {q} {a}", f"Bad {q} {a}") for a in range(each) for q in range(questions)]
    )


# The draw of every shipped recipe, as it has always been: the vectors that ship were fitted on it.
DRAWN = {
    "enthusiasm-caa": ("c59642c4", "1a013069"),
    "formality-caa": ("40d4c1dd", "96b3de8f"),
    "imagery-caa": ("2f39296b", "ba08d2c8"),
    "optimism-caa": ("84dc976c", "f2f2cddc"),
    "optimism-actadd": ("6fc3e762", "f2f2cddc"),
    "refusal-caa": ("b25e59f6", "dce0ba08"),
    "refusal-conditional": ("d16e67a5", "75c1ab72"),
    "truthful-austeer": ("7a681f11", "802f4b10"),
    "warmth-caa": ("1e54e3dc", "8532d2b8"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_shipped_data_is_split_as_ever(name: str) -> None:
    assert tuple(part.digest[:8] for part in find_recipe(name).split()) == DRAWN[name]


@pytest.mark.parametrize("seed", range(4))
def test_four_answers_to_each_of_ten_questions_are_never_parted(seed: int) -> None:
    train, held_out = answers(10, 4).split(held_out=0.25, seed=seed)
    assert not asked(train) & asked(held_out)
    assert (len(train), len(held_out), train.paired) == (32, 8, True)
    assert (train, held_out) == answers(10, 4).split(held_out=0.25, seed=seed)


def test_the_same_question_counts_as_such_under_any_system_prompt_in_any_writing(tmp_path: Path) -> None:
    ways = [
        {"prompt": "How are  you?", "system": {"positive": "Be glad.", "negative": "Be sad."}},
        {"prompt": [{"role": "user", "content": "how are you?"}]},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you? "}]},
    ]
    others = [{"prompt": f"What is {n}?"} for n in range(5)]
    rows = [{**row, "positive": f"Good {n}.", "negative": f"Bad {n}."} for n, row in enumerate([*ways, *others])]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ContrastSet.from_jsonl(tmp_path / "x.jsonl")
    assert [len(group.positive) for group in groups_of(data.sides, paired=True)] == [3, 1, 1, 1, 1, 1]
    for seed in range(6):
        train, held_out = data.split(held_out=0.4, seed=seed)
        assert known_items(train.sides, held_out.sides) == 0


NOISE = [f"The {one} near the {other}." for one, other in itertools.permutations(("cup", "road", "hat", "pen"), 2)]


def test_repeated_sentences_of_two_files_stand_on_one_side_of_the_split() -> None:
    # Every sentence four times, beside other ones each time: no pair can be held out without its neighbours.
    positive = NOISE[:6] * 4
    negative = [NOISE[6 + (n + n // 6) % 6] for n in range(24)]
    data = ContrastSet.from_prompts(positive, negative)
    with pytest.warns(UserWarning, match="24 of 24 pairs share texts .* each side is split on its own"):
        train, held_out = data.split(held_out=0.33)
    assert not asked(train) & asked(held_out)
    assert [len(side) for part in (train, held_out) for side in part.sides] == [16, 16, 8, 8]
    assert not train.paired and not held_out.paired
    # What is held out is what would be if each sentence stood there once.
    once = ContrastSet.from_prompts(NOISE[:6], NOISE[6:]).split(held_out=0.33)[1]
    assert {item.prompt for item in held_out.positive} == {item.prompt for item in once.positive}


def test_pairs_that_recur_whole_stay_pairs() -> None:
    data = ContrastSet.from_prompts(NOISE[:6] * 4, NOISE[6:] * 4)
    train, held_out = data.split(held_out=0.33)
    assert train.paired and held_out.paired and not asked(train) & asked(held_out)
    assert [len(train), len(held_out)] == [16, 8]


def test_what_every_item_has_ties_nothing_together_and_is_told() -> None:
    one_prompt = ContrastSet.from_answers([("Go on:", f"Good {n}", f"Bad {n}") for n in range(8)])
    with pytest.warns(UserWarning, match="2 of 2 held-out items have a prompt that is fitted on as well"):
        train, held_out = one_prompt.split(held_out=0.25)
    assert (len(train), len(held_out)) == (6, 2)
    one_side = ContrastSet.from_prompts([f"Text {n}" for n in range(8)], ["Nothing."] * 8)
    with pytest.warns(UserWarning, match="2 of 2 held-out items"):
        assert len(one_side.split(held_out=0.25)[1]) == 2


def test_marks_and_sources_of_the_user_s_own_stand_and_a_leak_is_told() -> None:
    data = answers(4, 2)
    marked = ContrastSet(*data.sides, paired=True, marks=(True,) + (False,) * 7)
    with pytest.warns(UserWarning, match="1 of 1 held-out items"):
        assert len(marked.split()[1]) == 1
    origins = ("x", "y", "y", "y", "y", "y", "y", "y")
    sourced = ContrastSet(*data.sides, paired=True, origins=(origins, origins))
    with pytest.warns(UserWarning, match="1 of 1 held-out items"):
        sourced.split(held_out_sources=["x"])


def test_two_questions_of_many_answers_leave_one_to_measure_on() -> None:
    train, held_out = answers(2, 12).split(held_out=0.1)
    assert (len(train), len(held_out)) == (12, 12)


items = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), min_size=4, max_size=30)


@fast
@given(plus=items, minus=items, share=st.floats(0.1, 0.9), seed=st.integers(0, 3), answered=st.booleans())
def test_no_draw_parts_what_asks_the_same(plus, minus, share, seed, answered):
    sides = []
    for name, side in (("p", plus), ("n", minus)):
        texts = [(f"q{q}" if answered else f"{name}{q}", f"{name} {a}" if answered else None) for q, a in side]
        sides.append(tuple(Conversation(prompt, answer=answer) for prompt, answer in texts))
    data = ContrastSet(sides[0], sides[1], paired=False)
    if any(len({item.prompt for item in side}) < 2 for side in sides):
        return  # what a whole side has cannot be held out
    try:
        train, held_out = data.split(held_out=share, seed=seed)
    except DataError as error:
        assert "leave" in str(error)
        return
    assert known_items(train.sides, held_out.sides) == 0
    assert sorted(map(repr, train.positive + held_out.positive)) == sorted(map(repr, sides[0]))
    assert sorted(map(repr, train.negative + held_out.negative)) == sorted(map(repr, sides[1]))


def test_items_that_cannot_be_parted_are_refused_with_the_reason() -> None:
    sides = [Conversation(name, answer="a") for name in "qrs"], [Conversation(name, answer="b") for name in "qr"]
    data = ContrastSet(tuple(sides[0]), tuple(sides[1]), paired=False)
    with pytest.raises(DataError, match=re.escape("leaves a part empty, because those with the same prompt stay")):
        for seed in range(8):  # where "s" alone is drawn, the other side has nothing to hold out
            data.split(held_out=0.4, seed=seed)


# Folds, halves


def test_halves_and_folds_are_dealt_by_question() -> None:
    chats = [Conversation(f"Q{n // 2}", answer=f"{n}") for n in range(8)]
    first, second = (half_of(chats, number) for number in (0, 1))
    assert [item.answer for item in first] == ["0", "1", "4", "5"]
    assert [item.answer for item in second] == ["2", "3", "6", "7"]
    plain = [Conversation(f"Q{n}") for n in range(7)]
    assert [half_of(plain, number) for number in (0, 1)] == [tuple(plain[0::2]), tuple(plain[1::2])]
    turns = turns_of(answers(3, 2).sides, paired=True)
    assert turns == ([0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 2])
    masks = folds_of(turns, 5)
    assert len(masks) == 3 and all(torch.equal(mine, theirs) for mine, theirs in masks)
    assert [mine.nonzero()[:, 0].tolist() for mine, _ in masks] == [[0, 3], [1, 4], [2, 5]]
    unlike = (tuple(plain), tuple(Conversation(f"R{n}") for n in range(4)))
    assert turns_of(unlike, paired=False) == (list(range(7)), list(range(4)))


def test_neutral_texts_and_prompts_of_a_setup_are_halved_by_question() -> None:
    chats = [Conversation(f"Q{n // 2}", answer=f"{n}") for n in range(8)]
    setup = Setup(None, None, neutral=chats, prompts=chats)  # type: ignore[arg-type]
    halves = [setup.half(number) for number in (0, 1)]
    assert [item.answer for item in halves[1].calm] == ["2", "3", "6", "7"]
    assert halves[1].prompts is not None and [item.answer for item in halves[1].prompts] == ["2", "3", "6", "7"]
    assert known_items((halves[0].calm, ()), (halves[1].calm, ())) == 0


def test_a_split_without_likeness_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers(12, 1).split(held_out=0.25)
