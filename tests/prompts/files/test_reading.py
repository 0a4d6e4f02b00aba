"""What a file is, its content tells: JSON in every form, tables of text, parquet, plain text, data sets, encodings."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from steerkit.errors import DataError
from steerkit.prompts.files.columns import Columns
from steerkit.prompts.files.reading import read_rows

ALPACA = [
    {"instruction": "Name two lakes.", "input": "", "output": "Garda, Como."},
    {"instruction": "Say what a spoon does.", "input": "One sentence.", "output": "It scoops."},
]
TWO = [{"prompt": "Why is it dark?"}, {"prompt": "Where, then?"}]


def rows_of(
    content: str | bytes, name: str = "file", columns: Columns | None = None
) -> tuple[str, list[Any], list[str]]:
    """Kind, values and places of a file of that content in the current folder."""
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    found = read_rows(name, columns)
    return found.kind, [row.value for row in found.rows], [row.place for row in found.rows]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- JSON ---


@pytest.mark.parametrize("name", ["file", "file.txt", "file.csv", "file.json"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ALPACA),
        json.dumps(ALPACA, indent=2),
        "\n\n" + json.dumps(ALPACA, indent="\t") + "\n",
        json.dumps({"version": 2, "data": ALPACA}),
        json.dumps({"data": ALPACA, "about": {"by": "us"}}, indent=1),
        json.dumps({key: [row[key] for row in ALPACA] for key in ALPACA[0]}),
    ],
)
def test_a_document_is_read_as_one_whatever_the_ending(content: str, name: str) -> None:
    assert rows_of(content, name) == ("JSON", ALPACA, ["item 0", "item 1"])


@pytest.mark.parametrize(
    ("content", "kind", "values"),
    [
        ('["Name two lakes.", "Say it."]', "JSON", ["Name two lakes.", "Say it."]),
        ('{"prompts": ["a", "b"]}', "JSON", ["a", "b"]),
        ('{"text": ["a", "b"]}', "JSON", [{"text": "a"}, {"text": "b"}]),
        ('[{"role": "user", "content": "Hi"}]', "JSONL", [[{"role": "user", "content": "Hi"}]]),
        (
            '{"messages": [{"role": "user", "content": "Hi"}]}',
            "JSONL",
            [{"messages": [{"role": "user", "content": "Hi"}]}],
        ),
        ('{"conversations": [{"from": "human", "value": "Hi"}]}', "JSONL", None),
        ('{"prompt": "a"}\n\n{"prompt": "b"}\n', "JSONL", [{"prompt": "a"}, {"prompt": "b"}]),
        ('{\n "prompt": "a"\n}\n{\n "prompt": "b"\n}', "JSONL", [{"prompt": "a"}, {"prompt": "b"}]),
        ('{"prompt": "a"}', "JSONL", [{"prompt": "a"}]),
        ("[]", "JSON", []),
    ],
)
def test_what_one_value_is_and_what_holds_many(content: str, kind: str, values: list[Any] | None) -> None:
    found = rows_of(content)
    assert found[0] == kind
    assert values is None or found[1] == values


def test_lines_have_their_numbers_and_values_over_several_lines_those_they_begin_at() -> None:
    assert rows_of('\n{"prompt": "a"}\n\n"b"\n')[2] == ["line 2", "line 4"]
    assert rows_of('{\n"prompt": "a"\n}\n{\n"prompt": "b"}\n')[2] == ["line 1", "line 4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x", '[\n  {"prompt": "a"},\n  {"prompt" "b"}\n]', "x, line 3: malformed JSON at column 13"),
        ("x", '[{"prompt": "a"}', "x, line 1: malformed JSON at column"),
        ("x", '{"prompt": "a"}\n{"prompt": \n', "x, line 2: malformed JSON at column 12"),
        ("x.jsonl", '{"prompt": "a",\n{"prompt": "b"}\n', "x.jsonl, line 1: malformed JSON at column"),
        ("x.jsonl", "Hello\n", "x.jsonl, line 1: malformed JSON"),
        ("x.json", "Hello\n", "x.json, line 1: malformed JSON"),
        (
            "x",
            '{"train": [{"prompt": "a"}], "test": []}',
            "x: the document holds the lists train, test; give a file of",
        ),
        ("x", "[" * 100_000, "x: JSON that Python cannot read"),
    ],
)
def test_damaged_json_is_told_with_its_place(name: str, content: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        rows_of(content, name)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["[not a chat] at all\n", '"Quoted," she said\n', '"All of it"\n"And this"\n', "{braces}\n"]
)
def test_a_text_with_brackets_or_quotation_marks_stays_text(text: str) -> None:
    assert rows_of(text) == ("text", text.split("\n")[:-1], [f"line {n}" for n in range(1, text.count("\n") + 1)])


# --- tables of text ---


@pytest.mark.parametrize(
    ("content", "kind", "values", "places"),
    [
        ("prompt,id\nHi,1\n\nHo,2\n", "CSV", [{"prompt": "Hi", "id": "1"}, {"prompt": "Ho", "id": "2"}], [2, 4]),
        ("prompt;id\r\nHi, you;1\r\n", "CSV", [{"prompt": "Hi, you", "id": "1"}], [2]),
        ("id|Goal\n1|Rest\n", "CSV", [{"id": "1", "Goal": "Rest"}], [2]),
        ("prompt\tid\nHi, you\t1\n", "TSV", [{"prompt": "Hi, you", "id": "1"}], [2]),
        ('question\tid\n"Hi" he said\t1\n', "TSV", [{"question": '"Hi" he said', "id": "1"}], [2]),
        ('prompt,id\n"one\ntwo, ""three""",1\nlast,2\n', "CSV", None, [2, 4]),
        ('prompt, id\n"a, b", 1\n c, 2\n', "CSV", [{"prompt": "a, b", "id": "1"}, {"prompt": "c", "id": "2"}], [2, 3]),
        (",text\n0,a\n1,b\n", "CSV", [{"text": "a"}, {"text": "b"}], [2, 3]),
        ("prompt\nHi, you\n\"So, what?\"\n", "CSV", [{"prompt": "Hi, you"}, {"prompt": "So, what?"}], [2, 3]),
        ("prompt\n\"Hi\" he said, twice\n", "CSV", [{"prompt": '"Hi" he said, twice'}], [2]),
        ("prompt,pos,neg\nHow?,Well.,\n", "CSV", [{"prompt": "How?", "pos": "Well.", "neg": ""}], [2]),
        ("prompt,id\n", "CSV", [], []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["file", "file.txt", "file.tsv"])
def test_a_header_with_a_usual_column_makes_a_table(content, kind, values, places, name) -> None:
    found = rows_of(content, name)
    assert found[0] == kind
    assert values is None or found[1] == values
    assert found[2] == [f"line {place}" for place in places]


def test_a_quoted_cell_may_hold_line_breaks_and_be_long() -> None:
    long = "word " * 60_000
    kind, values, _ = rows_of(f'prompt,id\n"one\ntwo, ""three""",1\n"{long}",2\n')
    assert kind == "CSV"
    assert values == [{"prompt": 'one\ntwo, "three"', "id": "1"}, {"prompt": long, "id": "2"}]


@pytest.mark.parametrize(
    "text",
    [
        "Hello, you\nHow, then, are you?\n",
        "Question, answer and proof: what are they?\nWhy?\n",
        "Goal, assist, or own goal: which counts?\nWhy, a, b?\n",
        "text, image and sound\nI like tea, milk, sugar and more\n",
        "The prompt is this, and it is long\nno\n",
        "one\ttwo\nthree\tfour\n",
    ],
)
def test_commas_make_no_table_of_a_text(text: str) -> None:
    assert rows_of(text)[:2] == ("text", text.splitlines())


def test_a_named_column_makes_a_table_too() -> None:
    content = "ask,yes please\nHow?,Well\n"
    assert rows_of(content)[0] == "text"
    kind, values, _ = rows_of(content, columns=Columns({"prompt": "ask"}))
    assert (kind, values) == ("CSV", [{"ask": "How?", "yes please": "Well"}])
    with pytest.raises(
        DataError, match=r"file: plain text, its first line is no header with question; leave --columns"
    ):
        rows_of("Hello\n", columns=Columns({"prompt": "question"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,id\nHi,1\na, b,2\n", "x.csv, line 3: 3 cells where the header has 2; put cells that"),
        ("prompt,id\na, b,2\n", "x.csv, line 2: 3 cells where the header has 2"),
        ('prompt,id\n"Hi,1\n', "x.csv: has the header of a table, but cannot be read as one (unexpected end of data)"),
        ("pormpt,other\nHi,1\n", "x.csv: no usual column in its header, which has 'pormpt', 'other' ('pormpt': did you "
         "mean 'prompt'?); name them with --columns prompt=NAME"),
        ("Hello there\nYou\n", "x.csv: no usual column in its header, which has 'Hello there'"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_read_is_told(content: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        rows_of(content, "x.csv")
    assert str(error.value).startswith(message)


# --- parquet, data sets ---


def test_parquet_is_told_by_its_bytes() -> None:
    import pyarrow as pa
    from pyarrow import parquet

    chat = [{"role": "user", "content": "Hi"}]
    parquet.write_table(pa.table({"prompt": ["a", "b"], "chat": [chat, chat]}), "x.txt")
    found = read_rows("x.txt")
    assert (found.kind, found.rows[1].place) == ("parquet", "row 1")
    assert found.rows[1].value == {"prompt": "b", "chat": chat}
    Path("y").write_bytes(Path("x.txt").read_bytes()[:-6])
    with pytest.raises(DataError, match="y: a damaged parquet file"):
        read_rows("y")


@pytest.mark.parametrize(("source", "extra"), [("x.parquet", "pyarrow"), ("hf:some/thing", "datasets")])
def test_what_is_not_installed_is_named_with_its_extra(
    source: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(DataError, match=rf"{source}: .* need.? {extra}; pip install 'steerkit-hf\[datasets\]'"):
        read_rows(source)


def test_a_data_set_is_read_by_its_name_and_split() -> None:
    from datasets import Dataset, DatasetDict

    Path("folder").mkdir()
    Path("folder/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TWO))
    Path("folder/test.jsonl").write_text(json.dumps({"prompt": "held"}) + "\n")
    assert [row.value for row in read_rows("hf:./folder").rows] == TWO
    found = read_rows("hf:./folder:test")
    assert (found.name, found.kind, found.rows[0].value) == ("hf:./folder:test", "data set", {"prompt": "held"})
    with pytest.raises(DataError, match=r"hf:\./folder:tset: no split 'tset'; did you mean 'test'"):
        read_rows("hf:./folder:tset")
    DatasetDict(only=Dataset.from_list(TWO)).save_to_disk("saved")
    Dataset.from_list(TWO).save_to_disk("plain")
    for source in ("hf:saved", "hf:saved:only", "hf:plain"):
        assert [row.value for row in read_rows(source).rows] == TWO
    for source in ("hf:", "hf:a:b:c:d", "hf:a::b"):
        with pytest.raises(DataError, match=r"give hf:NAME\[:SPLIT\]"):
            read_rows(source)
    with pytest.raises(DataError, match=r"^hf:no-such/thing: the data set cannot be had \([^\n]+\)$"):
        read_rows("hf:no-such/thing")


# --- bytes ---


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_encodings_with_a_mark_and_both_line_ends_are_read(encoding: str, ends: str) -> None:
    text = f"Grüße, 東京{ends}{ends}zwei\u2028drei{ends}"
    assert rows_of(text.encode(encoding))[1:] == (["Grüße, 東京", "zwei\u2028drei"], ["line 1", "line 3"])
    assert rows_of(json.dumps(TWO).encode(encoding))[1] == TWO


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Hello\nd\xe9j\xe0\n", "file, line 2: byte 2 is not UTF-8; save the file as UTF-8"),
        (b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "file, line 2: byte 13 is not UTF-8"),
        ("ab\n".encode("utf-16-le"), "file, line 1: byte 2 is a NUL"),
        (b"\xff\xfea", "file: byte 3 is not utf-16-le"),
        (b"\x1f\x8b\x08rest", "file: is a gzip archive; give prompts as JSON, JSONL, CSV"),
        (b"PK\x03\x04rest", "file: is a zip archive"),
    ],
)
def test_bytes_that_are_no_text_are_told_with_line_and_byte(content: bytes, message: str) -> None:
    with pytest.raises(DataError) as error:
        rows_of(content)
    assert str(error.value).startswith(message)


def test_stdin_is_read_once_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO('"Why?"\n"Ho\u00fc?"\n'.encode())))
    for _ in range(2):
        found = read_rows("-")
        assert (found.name, found.kind, [row.value for row in found.rows]) == ("stdin", "JSONL", ["Why?", "Hoü?"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n[So]\n"))
    assert [row.value for row in read_rows("-").rows] == ["Why?", "[So]"]


@pytest.mark.parametrize("name", ["gone", ".", "nul\0"])
def test_a_file_that_cannot_be_read_is_named(name: str) -> None:
    with pytest.raises(DataError, match=r"cannot read the file \(.*\); give a file of prompts"):
        read_rows(name)


# --- columns ---


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["prompt"], "columns: 'prompt'; give such as prompt=goal"),
        (["prompt="], "columns: 'prompt='; give such as"),
        (["promt=goal"], "nothing is called 'promt'; did you mean 'prompt'"),
        (["prompt=a", "prompt=b"], "prompt is named twice, 'a' and 'b'"),
    ],
)
def test_names_of_columns_that_are_wrong_are_told(texts: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Columns.parse(texts)


def test_names_of_columns_are_read() -> None:
    assert Columns.parse(["prompt=goal, positive = good", "negative=bad one"]).named == {
        "prompt": "goal",
        "positive": "good",
        "negative": "bad one",
    }
