"""Prompts, pairs and labelled prompts of every usual shape, as files, as tables and in memory."""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from steerkit.errors import DataError
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.files.columns import Columns
from steerkit.prompts.files.prompts import plain_prompt, read_prompts
from steerkit.prompts.messages import Message
from steerkit.prompts.rendering import render
from tests.program import jsonl
from tests.tiny_tokenizers import byte_tokenizer

USER: Message = {"role": "user", "content": "How was it?"}
GOOD: Message = {"role": "assistant", "content": "Great."}
BAD: Message = {"role": "assistant", "content": "Awful."}
SYSTEM: Message = {"role": "system", "content": "Be brief."}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(*rows: Any, name: str = "file") -> str:
    Path(name).write_text(jsonl(rows), encoding="utf-8")
    return name


def as_csv(*rows: dict[str, Any], name: str = "file.csv") -> str:
    made = io.StringIO()
    table = csv.DictWriter(made, list(dict.fromkeys(key for row in rows for key in row)))
    table.writeheader()
    table.writerows(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in rows
    )
    Path(name).write_text(made.getvalue(), encoding="utf-8", newline="")
    return name


def prompts_of(name: str, **options: Any) -> list[Any]:
    return [plain_prompt(one) for one in read_prompts(name, **options)]


# --- prompts ---


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Name a lake.", "input": "", "output": "Como."}, "Name a lake."),
        ({"instruction": "Say it.", "input": "In one word.", "output": "It."}, "Say it.\n\nIn one word."),
        ({"Goal": "Rest", "Target": "Sure"}, "Rest"),
        ({"text": "a"}, "a"),
        ({"id": 3, "question": "Why?", "answer": "So."}, "Why?"),
        ({"instruction": "Say it.", "text": "### Instruction: Say it."}, "Say it."),
        ({"prompt": "a", "system_prompt": "Be brief."}, [SYSTEM, {"role": "user", "content": "a"}]),
        ({"messages": [USER], "id": "x"}, [USER]),
        ({"chat": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"id": "a", "conversations": [{"from": "human", "value": "Tea?"}]}, [{"role": "user", "content": "Tea?"}]),
    ],
)
def test_the_prompt_of_a_row_has_one_of_the_usual_names(row: dict[str, Any], prompt: Any) -> None:
    assert prompts_of(written(row, row)) == [prompt] * 2
    assert prompts_of(as_csv(row, row)) == [prompt] * 2


def test_an_export_of_a_chat_ends_with_its_answer() -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Tea?"},
        {"from": "gpt", "value": "No."},
    ]
    (one,) = read_prompts(written({"conversations": turns}))
    assert one == Conversation(({**SYSTEM}, {"role": "user", "content": "Tea?"}), answer="No.")
    calls = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "w", "arguments": {"in": "Oslo"}}'},
        {"from": "observation", "value": "4"},
    ]
    function = {"name": "w", "arguments": {"in": "Oslo"}}
    assert prompts_of(written(calls, name="calls")) == [
        [
            {"role": "user", "content": "Weather?"},
            {"content": "", "role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": "4"},
        ]
    ]
    with pytest.raises(DataError, match="file, line 1: message 0: from 'nobody'; there are: human, user, gpt"):
        read_prompts(written({"conversations": [{"from": "nobody", "value": "x"}]}))


def test_keys_of_servers_and_empty_ones_are_dropped_and_the_others_reach_the_template() -> None:
    exported = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How"}, {"type": "input_text", "text": "was it?"}]},
        {
            **GOOD,
            "refusal": None,
            "annotations": [],
            "tool_calls": [],
            "id": "m1",
            "finish_reason": "stop",
            "weight": 1,
        },
        {"role": "user", "content": "And?", "name": "Ann", "created": 12},
        {**BAD, "tool_calls": [], "audio": None, "logprobs": {"content": []}},
    ]
    (one,) = read_prompts(written({"messages": exported}))
    assert one.answer == "Awful."
    assert one.prompt == (
        SYSTEM,
        {"role": "user", "content": "How\nwas it?"},
        GOOD,
        {"role": "user", "content": "And?", "name": "Ann"},
    )


def test_calls_of_tools_go_to_the_template() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "w", "arguments": '{"city": "Oslo"}'}}
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "4 degrees"},
        {"role": "assistant", "content": "It is 4 degrees."},
    ]
    (one,) = read_prompts(written({"messages": turns}))
    assert one.answer == "It is 4 degrees."
    assert one.prompt[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**call, "function": {"name": "w", "arguments": {"city": "Oslo"}}}],
    }
    assert one.prompt[2] == turns[2]
    unread = {**call, "function": {"name": "w", "arguments": "{"}}
    assert Conversation((turns[0], {**turns[1], "tool_calls": [unread]})).prompt[1]["tool_calls"] == [unread]
    with pytest.raises(DataError, match="the closing assistant turn has 'tool_calls' beside role and content"):
        read_prompts(written({"messages": turns[:2]}))


def test_declarations_of_tools_are_told_of_and_not_read() -> None:
    row = {"messages": [USER], "tools": [{"type": "function", "function": {"name": "w"}}]}
    with pytest.warns(UserWarning, match="file, line 2 and 1 more: 'tools' are not declared to the model"):
        assert prompts_of(written({"messages": [USER], "tools": []}, row, row)) == [[USER]] * 3


def test_pictures_are_refused_by_name() -> None:
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}},
    ]
    with pytest.raises(
        DataError, match=r"file, line 1: message 0, 'content': expected .* a part of the type 'image_url'"
    ):
        read_prompts(written({"messages": [{"role": "user", "content": parts}]}))


def test_columns_that_are_named_are_read_and_no_others() -> None:
    row = {"prompt": "not this", "ask": "this", "by": "Be brief."}
    named = Columns({"prompt": "ask", "system": "by"})
    for name in (written(row), as_csv(row)):
        assert prompts_of(name, columns=named) == [[SYSTEM, {"role": "user", "content": "this"}]]
        with pytest.raises(DataError, match=r"no column 'aks' for prompt; did you mean 'ask'"):
            read_prompts(name, Columns({"prompt": "aks", "system": "by"}))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": "x", "b": "y"}], "file, line 1: give 'prompt' or 'messages', or name its column "
         "(--columns prompt=NAME); the object has 'a', 'b'"),
        ([{"prompt": "x"}, {"instuction": "y"}], "file, line 2: give 'prompt' or 'messages', or name its column "
         "(--columns prompt=NAME); the object has 'instuction' ('instuction': did you mean 'instruction'?)"),
        ([{"prompt": "x", "messages": [USER]}], "file, line 1: give 'prompt' or 'messages'"),
        ([7], "file.json, item 0: prompt: expected a string or a list of messages, got 7"),
        ([{"prompt": None}], "file, line 1: prompt: expected a string or a list of messages, got None"),
        ([{"messages": []}], "file, line 1: prompt: an empty list of messages"),
        ([], "file: the file holds no prompt; write one a line"),
    ],
)  # fmt: skip
def test_a_row_without_a_prompt_is_told_with_what_there_is(rows: list[Any], message: str) -> None:
    if rows == [7]:
        Path("file.json").write_text("[7]")
        name = "file.json"
    else:
        name = written(*rows)
    with pytest.raises(DataError) as error:
        read_prompts(name)
    assert str(error.value).startswith(message)


def test_an_empty_cell_is_no_prompt() -> None:
    with pytest.raises(DataError, match=r"file\.csv, line 3: the cell of 'prompt' is empty; give a prompt, or leave"):
        read_prompts(as_csv({"prompt": "a", "id": "1"}, {"prompt": "", "id": "2"}))


# --- a template inside a template ---

MARKED = r"<|im_start|>user\nAct as a happy person.<|im_end|>\n<|im_start|>assistant\nI am"


def test_marks_of_a_template_are_told_once_with_the_way_out() -> None:
    Path("plus").write_text(f"{MARKED}\n{MARKED} so\n")
    Path("minus").write_text(f"{MARKED} not\n{MARKED} no\n")
    with pytest.warns(UserWarning) as told:
        assert prompts_of("plus") == [MARKED, f"{MARKED} so"]
    assert len(told) == 1
    assert "plus, line 1 and 1 more: '<|im_start|>' is a mark of a chat template" in str(told[0].message)
    assert str(told[0].message).endswith(
        r"--raw leaves prompts as they are, and with --escapes a written \n is a line break"
    )
    with pytest.warns(UserWarning, match="plus, line 1 and 3 more") as told:
        ContrastSet.from_file("plus", against="minus")
    assert len(told) == 1
    with pytest.warns(UserWarning, match=r"a written \\n stays two characters") as told:
        assert read_prompts("plus", raw=True)[0] == Conversation(MARKED, raw=True)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (first, _) = read_prompts("plus", raw=True, escapes=True)
        assert first.prompt == MARKED.replace(r"\n", "\n")
        Path("plain").write_text("Use \\n for a line break, or [brackets] <and> |bars|\n")
        read_prompts("plain")


@pytest.mark.parametrize("mark", ["[INST] a [/INST]", "<start_of_turn>user", "<|user|>", "### Instruction:\na"])
def test_marks_of_other_templates_are_known_too(mark: str) -> None:
    with pytest.warns(UserWarning, match="is a mark of a chat template"):
        ContrastSet.from_file(written({"positive": "a", "negative": mark}))


def test_two_files_are_two_sides_raw_where_asked() -> None:
    Path("plus").write_text(r"one\ttwo" + "\n" + "\\\\n\n")
    Path("minus").write_text("three\nfour\n")
    data = ContrastSet.from_file("plus", against="minus", raw=True, escapes=True)
    assert [item.prompt for item in data.positive] == ["one\ttwo", "\\n"]
    assert data.source == "plus, minus"
    assert data.paired
    assert data.positive[0].raw
    with pytest.raises(DataError, match="stdin: cannot be both sides"):
        ContrastSet.from_file("-", against="-")
    with pytest.raises(DataError, match="raw leaves a string as it is"):
        ContrastSet.from_file(written([USER]), against="minus", raw=True)


# --- pairs ---

ANSWERED = (Conversation("How was it?", "Great."), Conversation("How was it?", "Awful."))
CHATTED = (Conversation((USER,), "Great."), Conversation((USER,), "Awful."))
HUMAN = "\n\nHuman: How was it?\n\nAssistant: {}"


@pytest.mark.parametrize(
    ("row", "sides"),
    [
        ({"prompt": "How was it?", "chosen": "Great.", "rejected": "Awful.", "margin": 2}, ANSWERED),
        ({"instruction": "How was it?", "input": "", "chosen": "Great.", "rejected": "Awful."}, ANSWERED),
        ({"prompt": "How was it?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]}, CHATTED),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHATTED),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, CHATTED),
        ({"prompt": "How was it?", "chosen": [GOOD], "rejected": [BAD]}, CHATTED),
        (
            {
                "conversations": [{"from": "human", "value": "How was it?"}],
                "chosen": {"from": "gpt", "value": "Great."},
                "rejected": {"from": "gpt", "value": "Awful."},
            },
            CHATTED,
        ),
        ({"chosen": HUMAN.format("Great."), "rejected": HUMAN.format("Awful.")}, CHATTED),
        ({"chosen": "Great.", "rejected": "Awful."}, (Conversation("Great."), Conversation("Awful."))),
        (
            {"question": "Is it?\n (A) yes\n (B) no", "answer_matching_behavior": "(A)",
             "answer_not_matching_behavior": "(B)"},
            tuple(Conversation("Is it?\n (A) yes\n (B) no", answer) for answer in ("(A)", "(B)")),
        ),
        ({"question": "How was it?", "good": "Great.", "bad": "Awful."}, ANSWERED),
        (
            {"prompt": "How was it?", "system": "Be brief.", "chosen": "Great.", "rejected": "Awful."},
            tuple(Conversation("How was it?", answer, "Be brief.") for answer in ("Great.", "Awful.")),
        ),
    ],
)  # fmt: skip
def test_pairs_of_usual_shapes(row: dict[str, Any], sides: tuple[Conversation, Conversation]) -> None:
    from datasets import Dataset

    for data in (
        ContrastSet.from_file(written(row, row)),
        ContrastSet.from_file(as_csv(row, row)),
        ContrastSet.from_dataset([row, row]),
        ContrastSet.from_dataset(Dataset.from_list([row, row])),
    ):
        assert (data.positive[1], data.negative[1]) == sides
        assert (len(data), data.paired, data.marks, data.origins) == (2, True, (), ((), ()))


def test_a_table_of_our_own_columns() -> None:
    rows = [
        {
            "prompt": "How was it?",
            "positive": "Great.",
            "negative": "Awful.",
            "held_out": "",
            "source": "a",
            "note": "x",
        },
        {"prompt": "And then?", "positive": "Good.", "negative": "Bad.", "held_out": "true", "source": "b", "note": ""},
    ]
    data = ContrastSet.from_file(as_csv(*rows))
    assert (data.positive[0], data.negative[0]) == ANSWERED
    assert data.marks == (False, True)
    assert data.origins == (("a", "b"), ("a", "b"))
    assert data.source == "file.csv"
    raw = ContrastSet.from_file(as_csv({"positive": "I love", "negative": "I hate", "raw": "1"}))
    assert raw.positive == (Conversation("I love", raw=True),)
    with pytest.raises(DataError, match=r"file\.csv, line 2: held_out is true or false, got 'maybe'"):
        ContrastSet.from_file(as_csv({**rows[0], "held_out": "maybe"}))


def test_columns_of_pairs_can_be_named_and_then_other_keys_are_left_alone() -> None:
    row = {"ask": "How was it?", "plus": "Great.", "minus": "Awful.", "mood": 3}
    named = {"prompt": "ask", "positive": "plus", "negative": "minus"}
    for name in (written(row), as_csv(row)):
        data = ContrastSet.from_file(name, columns=named)
        assert (data.positive[0], data.negative[0]) == ANSWERED
    with pytest.raises(DataError, match="positive is named and the other side is not"):
        ContrastSet.from_file(written(row), columns={"positive": "plus"})
    with pytest.raises(DataError, match="file: no column 'mins' for negative; did you mean 'minus'"):
        ContrastSet.from_file(written(row), columns={**named, "negative": "mins"})
    own = {"prompt": "How was it?", "positive": "Great.", "negative": "Awful.", "mood": 3}
    with pytest.raises(DataError, match="line 1: unknown key 'mood'"):
        ContrastSet.from_file(written(own))
    assert ContrastSet.from_file(written(own), columns={"prompt": "prompt"}).positive[0] == ANSWERED[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Hello\nYou\n", "file: plain text has no two sides; give pairs (JSONL, CSV, ...), or two files of prompts"),
        ("prompt,negatve\na,b\n", "file, line 2: no columns of two sides; there are 'prompt', 'negatve' ('negatve': "
         "did you mean 'negative'?); name them with --columns positive=NAME,negative=NAME"),
        ("positive,negative\na,\n", "file, line 2: the cell of 'negative' is empty"),
        ('["a", "b"]', "file, item 0: expected a JSON object, got 'a'"),
        ('{"chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}', "file, line 1: chosen: an answer w"),
        ('{"chosen": {"x": 1}, "rejected": "b"}', "file, line 1: chosen: prompt: expected a string or a list"),
        ('{"question": 1, "instruction": 0, "sample": 0, "positive": "a", "negative": "b"}', "file: answers of a "
         "persona without their questions; give pairs.jsonl beside it"),
        ("prompt,chosen,rejected\n", "file: the file holds no item"),
        ("", "file: the file holds no item"),
    ],
)  # fmt: skip
def test_what_holds_no_pairs_is_told_with_what_there_is(content: str, message: str) -> None:
    Path("file").write_text(content)
    with pytest.raises(DataError) as error:
        ContrastSet.from_file("file")
    assert str(error.value).startswith(message)


# --- labels ---

LABELS = [("I won!", 1), ("I lost.", 0), ("Lovely", 1), ("Dreadful", 0)]


@pytest.mark.parametrize(
    "written_as",
    [
        lambda label: label,
        bool,
        float,
        str,
        lambda label: ["false", "True"][label],
        lambda label: ["neg", "pos"][label],
    ],
)
@pytest.mark.parametrize("make", [written, as_csv])
def test_labels_are_numbers_truths_or_words(written_as: Any, make: Any) -> None:
    name = make(*[{"prompt": prompt, "label": written_as(label)} for prompt, label in LABELS])
    data = ContrastSet.from_labelled(name)
    assert [item.prompt for item in data.positive] == ["I won!", "Lovely"]
    assert [item.prompt for item in data.negative] == ["I lost.", "Dreadful"]
    assert ContrastSet.from_file(name).digest == data.digest
    assert ContrastSet.from_labelled(name, positive=written_as(0)).digest != data.digest
    assert ContrastSet.from_labelled(name, positive=written_as(1), negative=written_as(0)).digest == data.digest


def test_labelled_rows_of_other_formats() -> None:
    rows = [{"text": prompt, "label": ["bad", "good"][label], "lang": "en"} for prompt, label in LABELS]
    data = ContrastSet.from_file(as_csv(*rows), positive="good")
    assert [item.prompt for item in data.positive] == ["I won!", "Lovely"]
    assert ContrastSet.from_file(written(*rows), positive="good").digest == data.digest
    assert ContrastSet.from_dataset([{**row, "label": row["label"] == "good"} for row in rows]).digest == data.digest
    preference = [{"prompt": "How?", "completion": text, "label": bool(label)} for text, label in LABELS]
    assert ContrastSet.from_file(written(*preference)).positive[0] == Conversation("How?", "I won!")
    named = [{"say": row["text"], "mood": row["label"], "label": "x"} for row in rows]
    columns = {"prompt": "say", "label": "mood"}
    assert ContrastSet.from_file(written(*named), columns=columns, positive="good").digest == data.digest
    with pytest.raises(DataError, match="file: the labels are bad, good; name the positive one"):
        ContrastSet.from_file(written(*rows))
    with pytest.raises(DataError, match=re.escape("file, line 1: label: expected a string, got 1.5")):
        ContrastSet.from_file(written({"text": "a", "label": 1.5}))


# --- tables in memory ---


def test_tables_in_memory_are_taken() -> None:
    import pandas as pd

    rows = [
        {"q": "How was it?", "good one": "Great.", "bad one": "Awful.", "chat": [USER]},
        {"q": "And?", "good one": "Good.", "bad one": "Bad.", "chat": [USER]},
    ]
    names = {"prompt": "q", "positive": "good one", "negative": "bad one"}
    expected = ContrastSet.from_dataset(rows, **names)
    assert (expected.positive[0], expected.negative[0]) == ANSWERED
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    for table in (pd.DataFrame(rows), columns, iter(rows)):
        assert ContrastSet.from_dataset(table, **names).digest == expected.digest
    frame = pd.DataFrame({"prompt": ["a", "b"], "positive": ["c", None], "negative": ["e", "f"]})
    with pytest.raises(DataError, match="row 1: the cell of 'positive' is empty"):
        ContrastSet.from_dataset(frame)
    chats = ContrastSet.from_dataset(pd.DataFrame(rows), positive="chat", negative="q")
    assert chats.positive[0] == Conversation((USER,))


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (7, {}, "expected a Dataset, a DataFrame or a list of objects, got int"),
        ("text", {}, "expected a Dataset, a DataFrame or a list of objects, got str"),
        ([{"a": "x"}], {}, "row 0: no columns of two sides; there are 'a'"),
        ([{"a": "x"}], {"positive": "a"}, "give both, or none of them"),
        ([{"a": "x"}], {"positive": "a", "negative": "b"}, "row 0: the dataset has no column 'b'; there are: a"),
        ([["a", "b"]], {"positive": "a", "negative": "b"}, "row 0: expected an object of columns, got ['a', 'b']"),
        ({"a": ["x", "y"], "b": ["z"]}, {}, "a table of columns has lists of one length"),
        ({"a": "xy"}, {}, "a table of columns has lists of one length"),
        ([], {}, "the file holds no item"),
    ],
)
def test_what_is_no_table_of_pairs_is_refused(table: Any, options: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        ContrastSet.from_dataset(table, **options)


# --- through a template ---

CALLS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function']['name'] + '(' }}"
    "{% for key, value in call['function']['arguments'].items() %}{{ key + '=' + value }}{% endfor %}"
    "{{ ')' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def test_what_was_read_is_what_a_template_writes() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "c", "content": "4 degrees"},
        {"role": "assistant", "content": "No.", "tool_calls": []},
    ]
    (one,) = read_prompts(written({"messages": turns}))
    text = "<system>Be brief.<user>Rain?<assistant>weather(city=Oslo)<tool>4 degrees<assistant>No."
    assert render(byte_tokenizer(CALLS), one).text == text
