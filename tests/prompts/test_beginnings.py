"""What texts share is read once: which beginnings are worth it, by columns counted text by text."""

from __future__ import annotations

import random

import pytest

from steerkit.prompts.beginnings import beginnings

ONE, TWO = tuple(range(100, 120)), tuple(range(200, 230))
"""Two system prompts."""


def columns(texts: list[tuple[int, ...]], begun: list[tuple[int, ...]]) -> int:
    """What is read: every beginning in a pass of its own, which costs twelve columns more, and the rests, padded."""
    read_once = sum(len(one) + 12 for one in set(begun) if one)
    return read_once + len(texts) * max(len(text) - len(one) for text, one in zip(texts, begun, strict=True))


def test_each_system_prompt_is_read_once_for_all_behind_it() -> None:
    texts = [(*ONE, 1, 2), (*TWO, 3), (*ONE, 4, 5, 6), (*TWO, 7, 8), (*ONE, 9)]
    assert beginnings(texts) == [ONE, TWO, ONE, TWO, ONE]


def test_the_words_that_all_templates_begin_with_are_not_what_is_shared() -> None:
    texts = [(0, 1, *system, question) for system in (ONE, TWO) for question in (7, 8, 9)]
    assert beginnings(texts) == [(0, 1, *ONE)] * 3 + [(0, 1, *TWO)] * 3


def test_one_that_begins_like_no_other_widens_nothing() -> None:
    stray = tuple(range(300, 340))
    found = beginnings([*[(*ONE, question) for question in range(6)], stray])
    assert found == [ONE] * 6 + [stray[:-1]]


@pytest.mark.parametrize(
    "texts",
    [
        [(1, 2, 3)],
        [(1,), (2,)],
        [(0, 1, 2), (0, 1, 3)],
        [tuple(range(start, start + 30)) for start in (0, 100, 200)],
        [(*ONE[:8], 1), (*ONE[:8], 2)],
    ],
)
def test_what_saves_nothing_is_left_whole(texts: list[tuple[int, ...]]) -> None:
    assert beginnings(texts) == [()] * len(texts)


def test_one_text_may_be_what_others_begin_with() -> None:
    assert beginnings([ONE, (*ONE, 1), (*ONE, 1, 2), (*ONE, 3)]) == [ONE] * 4


def test_a_long_ladder_of_texts_is_no_long_recursion() -> None:
    ladder = [tuple(range(length)) for length in range(1, 1500)]
    found = beginnings(ladder)
    assert columns(ladder, found) <= columns(ladder, [()] * len(ladder))


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_costs_more_than_whole_texts_or_than_what_all_share(seed: int) -> None:
    draw = random.Random(seed)
    systems = [tuple(draw.choices(range(9), k=draw.randrange(0, 30))) for _ in range(3)]
    drawn = [(0, *draw.choice(systems), *draw.choices(range(9), k=draw.randrange(1, 20))) for _ in range(12)]
    texts = list(dict.fromkeys(drawn))
    found = beginnings(texts)
    assert all(text[: len(one)] == one for text, one in zip(texts, found, strict=True))
    length = 0
    while all(len(text) > length and text[length] == texts[0][length] for text in texts):
        length += 1
    assert columns(texts, found) <= min(columns(texts, [text[:size] for text in texts]) for size in (0, length))
