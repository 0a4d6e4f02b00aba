"""Trait specifications: our files, the paper's, every mistake one can make in them, and the shipped ones."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import steerkit
from steerkit._support import shipped
from steerkit.errors import DataError, UnknownNameError
from steerkit.evaluate.judges.rubric import fill
from steerkit.persona.drafting import draft, skeleton
from steerkit.persona.instruction import FILL_IN, Instruction
from steerkit.persona.traits import TraitSpec, slug
from steerkit.prompts.conversation import Conversation

RUBRIC = "How glad is the answer?\n> {question}\n> {answer}"
SPEC = TraitSpec(
    "glad",
    (Instruction("Be glad.", "Be sad."), Instruction("Sing.", "Weep.")),
    ("What is snow?", "What is rain?", "What is fog?", "What is hail?", "What is dew?"),
    RUBRIC,
    "The assistant rejoices.",
    ("glad", "unhappy"),
)
GOOD = SPEC.to_toml()


def write(folder: Path, text: str, name: str = "glad.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path) -> str:
    with pytest.raises(DataError) as error:
        TraitSpec.load(path)
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    return text


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_specification_is_read_as_it_was_written(tmp_path: Path) -> None:
    SPEC.save(tmp_path / "glad.toml")
    assert TraitSpec.load(tmp_path / "glad.toml") == SPEC
    assert (tmp_path / "glad.toml").read_text(encoding="utf-8") == GOOD
    assert list(tmp_path.iterdir()) == [tmp_path / "glad.toml"]


@pytest.mark.parametrize(
    "text",
    [
        'say "no"',
        'three """ quotes',
        'ends with "',
        'ends with """',
        "back\\slash",
        "tab\tbell\x07del\x7f",
        "Grüße 🎉",
        "a\r\nb",
    ],
)
def test_any_text_survives_the_file(tmp_path: Path, text: str) -> None:
    spec = replace(
        SPEC,
        description=text,
        instructions=(Instruction(f"1 {text}", f"2 {text}"),),
        questions=(f"{text}?", "Why?"),
        rubric=f"{text}\n{{question}} {{answer}} {text}",
    )
    spec.save(tmp_path / "x.toml")
    assert TraitSpec.load(tmp_path / "x.toml") == spec
    assert TraitSpec.load(tmp_path / "x.toml").digest == spec.digest != SPEC.digest


def test_the_paper_s_structure_is_read(tmp_path: Path) -> None:
    content = {
        "instruction": [{"pos": "Be glad.", "neg": "Be sad."}],
        "questions": ["One?", "Two?", "Three?"],
        "eval_prompt": RUBRIC,
    }
    spec = TraitSpec.load(write(tmp_path, json.dumps(content), "very_glad.json"))
    assert (spec.trait, spec.description, spec.assistants) == ("very glad", "", ("", ""))
    assert spec.instructions == (Instruction("Be glad.", "Be sad."),)
    assert spec.rubric == RUBRIC
    assert spec.system_prompt(0, "positive") == "You are a very glad assistant. Be glad."
    assert spec.system_prompt(0, "negative") == "You are a helpful assistant. Be sad."
    path = write(tmp_path, json.dumps({**content, "eval_promt": "x"}), "x.json")
    assert "unknown key 'eval_promt'; did you mean 'eval_prompt'?" in message(path)
    path = write(tmp_path, json.dumps({**content, "instruction": [{"pos": "Be glad.", "negative": "x"}]}), "x.json")
    assert "instruction, pair 1: unknown key 'negative'" in message(path)
    assert "not a JSON file" in message(write(tmp_path, "{", "x.json"))
    assert "a list, not an object" in message(write(tmp_path, "[]", "x.json"))
    del content["questions"]
    assert "no 'questions'" in message(write(tmp_path, json.dumps(content), "x.json"))


def test_questions_are_halved() -> None:
    assert SPEC.extraction_questions == SPEC.questions[:3]
    assert SPEC.held_out_questions == SPEC.questions[3:]
    even = replace(SPEC, questions=SPEC.questions[:4])
    assert (len(even.extraction_questions), len(even.held_out_questions)) == (2, 2)


def test_system_prompts_have_the_right_article() -> None:
    assert SPEC.system_prompt(1, "positive") == "You are a glad assistant. Sing."
    assert SPEC.system_prompt(1, "negative") == "You are an unhappy assistant. Weep."


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("format = 1", "format = 2", "format = 2; this version of steerkit reads 1"),
        ("format = 1\n", "", "format = None"),
        ("description", "descripton", "unknown key 'descripton'; did you mean 'description'"),
        ('trait = "glad"\n', "", "no 'trait'"),
        ('trait = "glad"', "trait = 3", "trait: expected a text, got int"),
        ('trait = "glad"', 'trait = " "', "trait: is empty"),
        ('negative = "Be sad."', 'negativ = "Be sad."', "instructions, pair 1: unknown key 'negativ'"),
        (', negative = "Be sad."', "", "instructions, pair 1: no 'negative'"),
        ('"Be sad."', '"be  glad."', "instruction 1: both sides are the same text"),
        ('"Be sad."', '" "', "instruction 1, negative: is empty"),
        ('"Sing."', '"be glad."', "instruction 2 is instruction 1 again"),
        ('"What is fog?"', '"what is snow?"', "question 3 is question 1 again"),
        ('"What is fog?"', "7", "questions, number 3: expected a text, got int"),
        ("{answer}", "{anwser}", "rubric: no {answer} in it; it has {anwser}"),
        ("{question}", "it", "rubric: no {question} in it; write it"),
        ('positive = "glad", negative = "unhappy"', 'positive = "glad"', "assistants: no 'negative'"),
        ("questions = [", "questions = [[", "not a TOML file"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in GOOD
    assert words in message(write(tmp_path, GOOD.replace(old, new)))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    assert "cannot be read" in message(tmp_path / "missing.toml")
    (tmp_path / "x.toml").write_bytes(b"trait = \xff")
    assert "byte 9 is not UTF-8" in message(tmp_path / "x.toml")
    with pytest.raises(DataError, match="questions: got 1"):
        replace(SPEC, questions=("One?",))
    with pytest.raises(DataError, match="instructions: there is none"):
        replace(SPEC, instructions=())
    with pytest.raises(DataError, match="lone surrogate"):
        replace(SPEC, description="\ud800")
    with pytest.raises(DataError, match=r"is a \.toml file"):
        SPEC.save(tmp_path / "x.json")
    with pytest.raises(UnknownNameError, match="did you mean 'optimistic'"):
        TraitSpec.load("optimstic")


def test_a_file_name_of_a_trait() -> None:
    assert slug("Matter-of-fact, dry") == "matter-of-fact-dry"
    assert slug("../x") == "x"
    assert slug("?!") == "trait"


# --- shipped ---------------------------------------------------------------------------------------------------------


def test_there_are_six_shipped_traits() -> None:
    assert len(shipped.traits()) >= 6
    assert steerkit.TraitSpec.load("optimistic").trait == "optimistic"


@pytest.mark.parametrize("name", sorted(shipped.traits()))
def test_shipped_traits(name: str) -> None:
    spec = TraitSpec.load(name)
    assert spec.to_toml() == shipped.traits()[name].read_text(encoding="utf-8")
    assert spec.prompting.negative[2] == spec.system_prompt(2, "negative")
    assert len(spec.prompting) == len(spec.instructions)
    assert spec.trait == name
    assert (len(spec.instructions), len(spec.questions)) == (5, 40)
    assert not spec.open_places
    assert all(spec.assistants)
    assert spec.assistants[0] != spec.assistants[1]
    for pair in spec.instructions:
        words = [len(side.split()) for side in pair]
        assert abs(words[0] - words[1]) <= 0.25 * max(words), pair
    for question in spec.questions:
        assert name not in question.lower()
        assert Conversation(question)
    openings = Counter(" ".join(question.split()[:2]) for question in spec.questions)
    assert len(openings) >= 10
    filled = fill(spec.rubric, {"question": "Why?", "answer": "So.\nScore: 100"})
    assert "> Why?" in filled
    assert "> So.\n> Score: 100" in filled
    assert "{" not in filled
    assert "REFUSAL" in filled


def test_no_two_shipped_traits_share_a_question_or_a_held_out_one() -> None:
    asked = Counter(question for name in shipped.traits() for question in TraitSpec.load(name).questions)
    assert [question for question, count in asked.items() if count > 1] == []


# --- drafts ----------------------------------------------------------------------------------------------------------


def test_a_skeleton_says_what_to_fill_in(tmp_path: Path) -> None:
    empty = skeleton("curious")
    empty.save(tmp_path / "curious.toml")
    read = TraitSpec.load(tmp_path / "curious.toml")
    assert read == empty
    places = read.open_places
    assert len(places) == 1 + 1 + 10 + 40 + 1  # description, rubric, instructions, questions, the other assistant
    assert {"rubric", "instruction 5, negative", "question 40", "assistants, negative"} <= set(places)
    with pytest.raises(DataError) as error:
        read.check_filled("curious.toml")
    assert "curious.toml: 53 places are still to be filled in (description; rubric;" in str(error.value)
    assert "49 more" in str(error.value)
    text = (tmp_path / "curious.toml").read_text(encoding="utf-8")
    filled = text
    for number in range(100):
        filled = filled.replace(FILL_IN, f"written {number} <", 1)
    (tmp_path / "curious.toml").write_text(filled, encoding="utf-8")
    TraitSpec.load(tmp_path / "curious.toml").check_filled()


PAIRS = [{"positive": f"Ask {n} things.", "negative": f"Ask nothing {n} times."} for n in range(5)]
QUESTIONS = [f"What about {n} apples?" for n in range(60)]
SCALE = {"counts": "questions", "does_not_count": "length", **{str(n): f"like {n}" for n in (0, 25, 50, 75, 100)}}


class Author:
    """A writer whose replies to each part are given; it keeps what it was asked."""

    def __init__(self, **replies: list[Any]) -> None:
        self.replies = replies
        self.asked: list[tuple[str, int, str]] = []

    def __call__(self, prompt: str, number: int) -> str:
        part = next(
            part
            for part, words in (
                ("assistants", "opposite of"),
                ("instructions", "pairs of instructions"),
                ("questions", "questions or requests"),
                ("rubric", "will rate answers"),
            )
            if words in prompt
        )
        self.asked.append((part, number, prompt))
        replies = self.replies[part]
        reply = replies[min(number, len(replies) - 1)]
        return reply if isinstance(reply, str) else json.dumps(reply)

    def parts(self) -> list[str]:
        return [part for part, _, _ in self.asked]


def author(**changes: list[Any]) -> Author:
    whole = {
        "assistants": [{"opposite": "incurious"}],
        "instructions": [PAIRS],
        "questions": [QUESTIONS],
        "rubric": [SCALE],
    }
    return Author(**{**whole, **changes})


def test_a_model_writes_all_parts() -> None:
    writer = author()
    spec = draft("curious", "It asks back.", writer)
    assert writer.parts() == ["assistants", "instructions", "questions", "rubric"]
    assert all("curious" in prompt and "It asks back." in prompt for _, _, prompt in writer.asked[1:])
    assert spec.open_places == ()
    assert spec.assistants == ("curious", "incurious")
    assert [pair._asdict() for pair in spec.instructions] == PAIRS
    assert spec.questions == tuple(QUESTIONS[:40]), "what is too much is left out"
    assert "75: like 75" in spec.rubric
    assert "What does not count: length" in spec.rubric


def test_what_is_missing_is_asked_for_again() -> None:
    writer = author(
        instructions=[PAIRS[:2], PAIRS[1:4], PAIRS[4:]],
        questions=[QUESTIONS[:25], QUESTIONS[20:41]],
        rubric=[{"counts": "questions", "0": "like 0"}, {k: v for k, v in SCALE.items() if k != "0"}],
    )
    spec = draft("curious", "", writer)
    assert spec.open_places == ("description",)
    assert [pair._asdict() for pair in spec.instructions] == PAIRS
    assert spec.questions == tuple(QUESTIONS[:40])
    assert writer.parts() == ["assistants", *["instructions"] * 3, *["questions"] * 2, *["rubric"] * 2]
    again = [prompt for part, number, prompt in writer.asked if part == "instructions" and number == 1]
    assert "Write 3 pairs" in again[0]
    assert "Ask 1 things." in again[0]


@pytest.mark.parametrize(
    "mangled",
    [
        lambda text: f"Sure, here you are:\n```json\n{text}\n```\nAnything else?",
        lambda text: f'<think>a {{}} ["no, not this one"]</think>{text}',
        lambda text: text[:-1],  # the closing bracket
        lambda text: text.replace("Ask 1", "Ask\n1"),  # a baseline line break inside of a string
    ],
)
def test_replies_around_and_within_which_things_are_wrong(mangled: Any) -> None:
    writer = author(instructions=[mangled(json.dumps(PAIRS))], questions=[mangled(json.dumps(QUESTIONS[:40]))])
    spec = draft("curious", "It asks back.", writer)
    assert spec.open_places == ()
    assert [pair.positive for pair in spec.instructions] == [pair["positive"] for pair in PAIRS]
    assert spec.questions == tuple(QUESTIONS[:40])


def test_a_reply_that_breaks_off_in_the_middle_of_an_item() -> None:
    cut = json.dumps(PAIRS)[: json.dumps(PAIRS).index("Ask nothing 3") + 8]
    asked = json.dumps(QUESTIONS)[: json.dumps(QUESTIONS).index("about 30") + 3]
    writer = author(instructions=[cut, PAIRS], questions=[asked, QUESTIONS])
    spec = draft("curious", "It asks back.", writer)
    assert spec.open_places == ()
    assert spec.questions == tuple(QUESTIONS[:40])
    assert writer.parts().count("instructions") == 2


def test_the_paper_s_keys_and_lists_of_lines_are_read_too() -> None:
    whole = {"instruction": [{"pos": pair["positive"], "neg": pair["negative"]} for pair in PAIRS]}
    lines = "\n".join(f"{number}. {question}" for number, question in enumerate(QUESTIONS[:40], start=1))
    spec = draft("curious", "It asks back.", author(instructions=[whole], questions=[lines]))
    assert [pair._asdict() for pair in spec.instructions] == PAIRS
    assert spec.questions == tuple(QUESTIONS[:40])


def test_what_a_model_never_gives_stays_to_be_filled_in() -> None:
    useless = author(
        assistants=["I would say: the opposite."],
        instructions=["", [{"positive": "Same.", "negative": "same."}], [{"positive": "...", "negative": "x"}]],
        questions=["no idea"],
        rubric=['{"counts": "a {answer}", "0": 3}'],
    )
    spec = draft("curious", "It asks back.", useless, tries=3)
    assert len(spec.open_places) == 1 + 10 + 40 + 1
    assert useless.parts().count("instructions") == 3
    assert useless.parts().count("questions") == 6
    with pytest.raises(DataError, match="trait: is empty"):
        draft(" ", "", useless)
