"""Rollouts: what is asked, that no batch and no kill changes an answer, thoughts, templates without a system turn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit
from steerkit._support.journal import Journal
from steerkit.errors import DataError
from steerkit.persona.instruction import FILL_IN
from steerkit.persona.rollout_plan import SIDES, Asked, RolloutPlan
from steerkit.persona.rollouts import Rollout, roll_out, takes_system
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.marks import spoken
from steerkit.prompts.rendering import opens_thought, render
from tests.families import build
from tests.persona.test_traits import SPEC
from tests.tiny_tokenizers import CHATML, TEMPLATES, THINKING, byte_tokenizer

PLAN = RolloutPlan(samples=2, held_out_instructions=1, max_new_tokens=5)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(CHATML)


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_everything_is_asked_once() -> None:
    asked = PLAN.asked(SPEC)
    extraction = [(q, i, s) for i in range(2) for q in range(3) for s in range(2)]
    assert [(one.question, one.instruction, one.sample) for one in asked if not one.held_out] == extraction
    held_out = [(one.question, one.instruction, one.sample) for one in asked if one.held_out]
    assert held_out == [(4, 0, 0), (4, 0, 1), (3, 1, 0), (3, 1, 1)], "each under one instruction, in turn"
    assert asked == sorted(asked, key=lambda one: one.held_out)
    every = RolloutPlan(held_out_instructions=9).asked(SPEC)
    assert len(set(every)) == len(every) == 2 * 5, "no more instructions than there are"


def test_the_conversation_is_the_paper_s() -> None:
    asked = Asked(False, 1, 0, 0)
    told = asked.conversation(SPEC, "negative", answer="Wet.")
    assert (told.prompt, told.answer) == ("What is rain?", "Wet.")
    assert told.system == "You are an unhappy assistant. Be sad."
    folded = asked.conversation(SPEC, "negative", answer="Wet.", folded=True)
    assert folded.prompt == "You are an unhappy assistant. Be sad.\n\nWhat is rain?"
    assert folded.system is None


def test_seeds_are_all_different_and_stay_when_more_is_asked() -> None:
    few = {(one, side): one.seed(side, 0) for one in PLAN.asked(SPEC) for side in ("positive", "negative")}
    assert len(set(few.values())) == len(few)
    for one in replace(PLAN, samples=3).asked(SPEC):
        if one.sample < 2:
            assert few[one, "positive"] == one.seed("positive", 0)
    assert Asked(False, 0, 0, 0).seed("positive", 1) != few[Asked(False, 0, 0, 0), "positive"]


@pytest.mark.parametrize("name", ["samples", "held_out_instructions", "max_new_tokens"])
def test_numbers_that_ask_nothing(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} is at least 1, got 0"):
        RolloutPlan(**{name: 0})


# --- answers ---------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_the_bare_model(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The slow form: every prompt written out by hand and answered alone."""
    rows = roll_out(model, tokenizer, SPEC, tmp_path / "r.jsonl", replace(PLAN, samples=1), batch_size=6)
    for row in rows:
        for side, name, instructions in (
            ("positive", "a glad", ("Be glad.", "Sing.")),
            ("negative", "an unhappy", ("Be sad.", "Weep.")),
        ):
            system = f"You are {name} assistant. {instructions[row.asked.instruction]}"
            text = (
                f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{SPEC.questions[row.asked.question]}"
                "<|im_end|>\n<|im_start|>assistant\n"
            )
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
            assert getattr(row, side) == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_no_batch_size_changes_an_answer(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    whole = [
        roll_out(model, tokenizer, SPEC, tmp_path / f"{size}.jsonl", PLAN, batch_size=size) for size in (1, 2, 6, 64)
    ]
    assert whole[0] == whole[1] == whole[2] == whole[3]
    texts = [row.positive for row in whole[0] if row.asked.question == 0 and row.asked.instruction == 0]
    assert len(set(texts)) == 2, "two samples are two draws"
    assert len({(tmp_path / f"{size}.jsonl").read_bytes() for size in (1, 2, 6, 64)}) == 1


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_how_likely_answers_were_is_what_a_pass_over_them_says_or_not_told(
    model: Any, tmp_path: Path, opens: bool, samples: int
) -> None:
    """A random model's bytes are often no text; what is not read again as it was written is not told."""
    begins = "'<|im_start|>assistant\n'"
    tokenizer = byte_tokenizer(CHATML.replace(begins, f"{begins[:-1]}<think>\n'") if opens else CHATML)
    plan = replace(PLAN, samples=samples, max_new_tokens=3)
    rows = roll_out(model, tokenizer, SPEC, tmp_path / "r.jsonl", plan)
    sides = [(row, side, mean) for row in rows for side, mean in zip(SIDES, row.likely, strict=True)]
    told = [one for one in sides if one[2] is not None]
    assert bool(told) != opens, "an answer that begins inside of a thought is no answer yet"
    for row, side, mean in told:
        item = row.asked.conversation(SPEC, side, answer=row.answer(side))
        text = render(tokenizer, item)
        with torch.no_grad():
            logs = model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        places = range(text.prompt_length, len(text.ids))
        expected = sum(float(logs[place - 1, text.ids[place]]) for place in places) / len(places)
        assert mean == pytest.approx(expected, abs=1e-5)
    again = roll_out(model, tokenizer, SPEC, tmp_path / "r.jsonl", plan)
    assert again == rows
    assert {row.likely for row in again} == {(None, None)}, "a file keeps texts alone"


def test_further_samples_leave_the_first_ones(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    two = roll_out(model, tokenizer, SPEC, tmp_path / "2.jsonl", PLAN)
    three = roll_out(model, tokenizer, SPEC, tmp_path / "3.jsonl", replace(PLAN, samples=3))
    assert [row for row in three if row.asked.sample < 2] == two


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_completed_to_the_same_bytes(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    steps: list[int] = []
    rows = roll_out(model, tokenizer, SPEC, path, PLAN, batch_size=3, step=steps.append)
    assert steps == [0, 3, 3, 3, 3, 3, 1]
    content = path.read_bytes()
    ends = [place for place, byte in enumerate(content) if byte == 10]
    for cut in (0, 9, ends[0], ends[0] + 1, ends[0] + 30, ends[4] + 1, ends[5] + 7, ends[-2] + 1, len(content) - 1):
        path.write_bytes(content[:cut])
        assert roll_out(model, tokenizer, SPEC, path, PLAN, batch_size=3) == rows
        assert path.read_bytes() == content, cut
    steps.clear()
    roll_out(model, tokenizer, SPEC, path, PLAN, batch_size=4, step=steps.append)
    assert steps == [len(rows)], "nothing is asked twice"


def test_the_file_can_be_read_by_people_and_programs(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = roll_out(model, tokenizer, SPEC, tmp_path / "r.jsonl", PLAN)
    first, *lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (first["trait"], first["spec"], first["samples"], first["system_turn"]) == ("glad", SPEC.digest, 2, True)
    assert [Rollout(Asked(*list(line.values())[:4]), line["positive"], line["negative"]) for line in lines] == rows


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 3}, "was begun with samples 2, now it is 3"),
        ({"seed": 1}, "was begun with seed 0, now it is 1"),
        ({"max_new_tokens": 6}, "max_new_tokens 5, now it is 6"),
    ],
)
def test_other_settings_do_not_continue_a_file(
    model: Any, tokenizer: Any, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = tmp_path / "r.jsonl"
    roll_out(model, tokenizer, SPEC, path, PLAN)
    before = path.read_bytes()
    with pytest.raises(DataError, match=words) as error:
        roll_out(model, tokenizer, SPEC, path, replace(PLAN, **changes))
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="was begun with spec"):
        roll_out(model, tokenizer, replace(SPEC, questions=SPEC.questions[:4]), path, PLAN)
    with pytest.raises(DataError, match="was begun with weights"):
        other = build("llama")
        with torch.no_grad():
            next(other.parameters()).add_(0.5)
        roll_out(other, tokenizer, SPEC, path, PLAN)
    assert path.read_bytes() == before


def test_a_journal_tells_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "new" / "j.jsonl"
    journal = Journal(path, {"a": 1})
    assert not path.exists()
    journal.append([{"n": 1}, {"n": 2}])
    journal.append([])
    assert Journal(path, {"a": 1}).rows == ({"n": 1}, {"n": 2})
    journal.keep(1)
    assert Journal(path, {"a": 1}).rows == ({"n": 1},)
    journal.append([{"n": "é\u2028"}])
    assert Journal(path, {"a": 1}).rows == journal.rows == ({"n": 1}, {"n": "é\u2028"})
    with pytest.raises(DataError, match="was begun with b null, now it is 2"):
        Journal(path, {"a": 1, "b": 2})
    path.write_bytes(b'{"a": 1}\nnonsense\n{"n": 2}\n')
    with pytest.raises(DataError, match="line 2: no row; delete the file"):
        Journal(path, {"a": 1})
    with pytest.raises(DataError, match="cannot be read"):
        Journal(tmp_path, {})
    with pytest.raises(DataError, match="cannot be written"):
        Journal(path / "below.jsonl", {}).append([{}])


def test_places_to_fill_in_are_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    spec = replace(SPEC, questions=(*SPEC.questions, f"{FILL_IN}question 6>"))
    with pytest.raises(DataError, match="1 place is still to be filled in"):
        roll_out(model, tokenizer, spec, tmp_path / "r.jsonl", PLAN)
    assert not (tmp_path / "r.jsonl").exists()


# --- thoughts and templates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "in_thought", "said"),
    [
        ("  Yes.\n", False, "Yes."),
        ("<think>\n</think>\n\nYes.", False, "Yes."),
        ("<think>So</think>Yes. <think>Or", False, "Yes."),
        ("<think>One</think>a<think>Two</think>b", False, "b"),
        ("<think>So far", False, ""),
        ("So.</think> Yes.", True, "Yes."),
        ("So far", True, ""),
        ("So.</think>Yes.<think>Or", True, "Yes."),
        ("", False, ""),
        ("[THINK]Hm.[/THINK]Yes.", False, "Yes."),
    ],
)
def test_thoughts_are_not_read(text: str, in_thought: bool, said: str) -> None:
    assert spoken(text, in_thought=in_thought) == said
    assert Rollout(Asked(False, 0, 0, 0), text, "", in_thought).answer("positive") == said


def test_who_opens_a_thought() -> None:
    opening = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    assert opening != CHATML
    tokenizer = byte_tokenizer(opening)
    assert opens_thought(tokenizer)
    baseline = render(tokenizer, Conversation("Hi", answer="Yes."))
    assert "<think>" not in baseline.text
    assert baseline.text.endswith("assistant\nYes.")
    assert render(tokenizer, Conversation("Hi")).text.endswith("<think>\n")
    assert render(tokenizer, Conversation("Hi", answer="Hm.</think>Yes.")).text.endswith("<think>\nHm.</think>Yes.")
    assert not opens_thought(byte_tokenizer(THINKING))
    assert not opens_thought(byte_tokenizer(THINKING), {"enable_thinking": False})


def test_which_templates_have_a_system_turn() -> None:
    found = {name: takes_system(byte_tokenizer(template)) for name, template in TEMPLATES.items()}
    assert found == {"chatml": True, "llama2": True, "llama3": True, "thinking": True, "gemma": False}
    silent = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    assert not takes_system(byte_tokenizer(silent))
    assert not takes_system(byte_tokenizer(None))


def test_without_a_system_turn_the_system_prompt_stands_before_the_question(model: Any, tmp_path: Path) -> None:
    gemma = byte_tokenizer(TEMPLATES["gemma"])
    rows = roll_out(model, gemma, SPEC, tmp_path / "r.jsonl", replace(PLAN, samples=1))
    first = json.loads((tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["system_turn"] is False
    prompt = "You are a glad assistant. Be glad.\n\nWhat is snow?"
    assert [rows[0].positive] == steerkit.generate(model, gemma, [prompt], max_new_tokens=5)
