"""`steerkit monitor`: tables, streams, new columns, summaries, heat maps, shift and difference, and every mistake."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit
from steerkit.cli.monitor import score
from steerkit.cli.monitor.items import items_of
from steerkit.evaluate.intervals import correlation, separability
from steerkit.monitor.monitor import Monitor
from steerkit.prompts.files.columns import Columns
from steerkit.vector.steering_vector import SteeringVector
from tests.program import WIDTH, Cli, jsonl, plain, start, width

ITEMS = [
    {"id": "a", "prompt": "How are you?", "response": "Fine, thank you.", "score": 10, "label": True},
    {"id": "b", "prompt": "Why?", "response": "Because.", "score": 35.5, "label": False},
    {
        "id": "c",
        "messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "No."}],
        "score": 2,
    },
    {"id": "d", "prompt": "And now?", "response": "", "score": 90, "label": True},
    {"id": "e", "prompt": "Who is it?", "response": "Nobody \u2028 of note.", "score": None, "label": True},
]
PROMPTS = ["How are you?", "Why?"]


@pytest.fixture
def monitor(here: Path, tiny: Path) -> Callable[..., Monitor]:
    def made(**options: Any) -> Monitor:
        return Monitor(*steerkit.load_model(str(tiny)), SteeringVector.load("v.safetensors"), **options)

    Path("items.jsonl").write_text(jsonl(ITEMS))
    return made


def values(rows: list[dict[str, Any]], name: str = "projection") -> torch.Tensor:
    return torch.tensor([float("nan") if row[name] is None else row[name] for row in rows])


def test_prompts(answer: Callable[..., Any], cli: Cli, monitor: Callable[..., Monitor], tiny: Path) -> None:
    found = answer("monitor", *PROMPTS, "--vector", "v.safetensors", "--model", tiny)
    torch.testing.assert_close(values(found["items"]), monitor().score(PROMPTS), rtol=1e-4, atol=1e-5)
    assert [row["prompt"] for row in found["items"]] == PROMPTS
    assert found["summary"]["unit"] == "standard deviations"
    ended = cli("monitor", *PROMPTS, "--vector", "v.safetensors", "--model", tiny)
    assert (ended.code, ended.err) == (0, "")
    for row in found["items"]:
        assert f"{row['projection']:+.3f}" in ended.out
    assert width(ended.out.split("\n")) <= WIDTH
    raw = answer(
        "monitor", *PROMPTS, "--vector", "v.safetensors", "--model", tiny, "--uncalibrated", "--kind", "cos", "--raw"
    )
    expected = monitor(calibrated=False, kind="cos").score(PROMPTS, raw=True)
    torch.testing.assert_close(values(raw["items"]), expected, rtol=1e-4, atol=1e-5)
    assert raw["summary"]["unit"] == "cosine"


def test_a_file_gets_a_column(cli: Cli, monitor: Callable[..., Monitor], tiny: Path) -> None:
    words = (
        "monitor",
        "--data",
        "items.jsonl",
        "--vector",
        "v.safetensors",
        "--model",
        tiny,
        "--read",
        "response_mean",
    )
    ended = cli(*words, "--out", "new/out.jsonl", "--column", "joy")
    assert (ended.code, ended.err) == (0, "")
    rows = [json.loads(line) for line in Path("new/out.jsonl").read_text().removesuffix("\n").split("\n")]
    assert [{key: value for key, value in row.items() if key != "joy"} for row in rows] == ITEMS
    scores = monitor(read="response_mean").score(ITEMS)
    torch.testing.assert_close(values(rows, "joy"), scores, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert rows[3]["joy"] is None
    told = correlation(scores, torch.tensor([10, 35.5, 2, 90, torch.nan]))
    area = separability(scores[[0, 3, 4]], scores[[1]])
    for words_in in (f"{told.mean:+.3f}", f"{area.mean:+.3f}", f"{area.low:+.3f}", "4 of 5 items", "new/out.jsonl"):
        assert words_in in plain(ended.out)
    assert width(ended.out.split("\n")) <= WIDTH
    piped = cli(*words)
    assert [json.loads(line)["projection"] for line in piped.out.removesuffix("\n").split("\n")] == [
        row["joy"] for row in rows
    ]
    assert "correlation with score" in piped.err  # the items alone on stdout


def test_summary_in_json(answer: Callable[..., Any], monitor: Callable[..., Monitor], tiny: Path) -> None:
    common = ("monitor", "--vector", "v.safetensors", "--model", tiny)
    found = answer(*common, "--data", "items.jsonl")["summary"]
    scores = monitor().score(ITEMS)
    told = correlation(scores, torch.tensor([10, 35.5, 2, 90, torch.nan]))
    area = separability(scores[[0, 3, 4]], scores[[1]])
    assert list(found["correlation_with_score"].values()) == pytest.approx(list(told), abs=1e-3)
    assert list(found["auc_of_label"].values()) == pytest.approx(list(area), abs=1e-3)
    assert (found["items"], found["scored"]) == (5, 5)
    assert found["sd"] == pytest.approx(float(scores.std()), abs=1e-3)
    Path("baseline.jsonl").write_text('"Why?"\n[{"role": "user", "content": "Why?"}]\n')
    baseline = answer(*common, "--data", "baseline.jsonl")
    assert "correlation_with_score" not in baseline["summary"]
    assert baseline["items"][0]["projection"] == pytest.approx(baseline["items"][1]["projection"], abs=1e-5)


def test_a_line_is_answered_before_the_next_is_there(
    cli: Cli, monitor: Callable[..., Monitor], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = [threading.Event() for _ in range(3)]
    told = iter(answered)
    say = score.print_item
    monkeypatch.setattr(score, "print_item", lambda row: (say(row), next(told).set()))

    def lines() -> Iterator[str]:
        for number, event in enumerate(answered):
            yield json.dumps({"prompt": f"Why {number}?", "id": number})
            assert event.wait(60)

    monkeypatch.setattr("sys.stdin", lines())
    ended = cli("monitor", "--data", "-", "--vector", "v.safetensors", "--model", tiny)
    assert [json.loads(line)["id"] for line in ended.out.splitlines()] == [0, 1, 2]


@pytest.mark.slow  # a process of its own
def test_a_stream_is_answered_line_by_line(monitor: Callable[..., Monitor], tiny: Path) -> None:
    words = ("monitor", "--data", "-", "--vector", "v.safetensors", "--model", tiny)
    process = start(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    expected = monitor().score([{"prompt": "Why?"}, ITEMS[2]])
    for item, value in zip(({"prompt": "Why?", "id": 7}, ITEMS[2]), expected.tolist(), strict=True):
        process.stdin.write(json.dumps(item) + "\n")
        process.stdin.flush()
        row = json.loads(process.stdout.readline())  # before the next item is written
        assert row.pop("projection") == pytest.approx(value, abs=1e-4)
        assert row == item
    process.stdin.write("{\n")
    process.stdin.flush()
    wrong = json.loads(process.stdout.readline())
    assert (wrong["line"], wrong["error"].partition(":")[0]) == (3, "malformed JSON at column 2")
    process.stdin.write('{"prompt": "Why?"}\n')
    out, _ = process.communicate()
    assert process.returncode == 0
    assert json.loads(out)["projection"] == pytest.approx(expected.tolist()[0], abs=1e-4)


def test_lines_that_wait_are_read_together(
    cli: Cli, monitor: Callable[..., Monitor], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    score = Monitor.score

    def counted(self: Monitor, items: Any, **options: Any) -> Any:
        together.append(len(items))
        return score(self, items, **options)

    monkeypatch.setattr(Monitor, "score", counted)
    lines = [json.dumps({"prompt": f"Why {number}?", "id": number}) for number in range(40)]
    lines[17] = json.dumps({"id": 17})  # one that is wrong does not take the others of its batch with it
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    ended = cli("monitor", "--data", "-", "--vector", "v.safetensors", "--model", tiny, "--batch-size", 8)
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert [row["id"] for row in rows] == list(range(40))
    assert [row["id"] for row in rows if "error" in row] == [17]
    assert max(together) > 1
    alone = monitor().score([json.loads(lines[3])])
    assert rows[3]["projection"] == pytest.approx(float(alone), abs=1e-4)


def test_a_long_file_is_read_in_parts(
    cli: Cli, monitor: Callable[..., Monitor], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("monitor", "--data", "items.jsonl", "--vector", "v.safetensors", "--model", tiny, "--batch-size", 2)
    monitor()
    whole = cli(*words, "--out", "whole.jsonl")
    monkeypatch.setattr("steerkit.cli.monitor.score._AT_ONCE", 1)
    parts = cli(*words, "--out", "parts.jsonl")
    assert (whole.code, parts.code) == (0, 0)
    assert parts.out.replace("parts", "whole") == whole.out
    rows = [
        [json.loads(line) for line in Path(name).read_text().split("\n")[:-1]]
        for name in ("whole.jsonl", "parts.jsonl")
    ]
    torch.testing.assert_close(values(rows[0]), values(rows[1]), rtol=1e-4, atol=1e-5)


def test_items_of_a_long_file_are_not_kept(here: Path) -> None:
    line = json.dumps({"prompt": "Why?", "source": "x" * 100_000}) + "\n"
    with Path("long.jsonl").open("w") as file:
        file.writelines(line for _ in range(200))  # 20 MB
    tracemalloc.start()
    try:
        items, _ = items_of("long.jsonl", Columns())
        assert sum(1 for _ in items) == sum(1 for _ in items) == 200
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_a_mistake_in_a_late_line_is_found_before_anything_is_read(
    cli: Cli, here: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Monitor, "score", lambda *_, **__: pytest.fail("it was read"))
    Path("late.jsonl").write_text(jsonl([{"prompt": "Why?"}] * 50) + '{"id": 3}\n')
    ended = cli("monitor", "--data", "late.jsonl", "--vector", "v.safetensors", "--model", tiny, "--out", "x.jsonl")
    assert ended.code == 1
    assert ended.err.startswith("error: late.jsonl, line 51: ")
    assert not Path("x.jsonl").exists()


@pytest.mark.slow
def test_a_file_of_a_gigabyte_takes_the_memory_of_one_of_a_megabyte(here: Path, tiny: Path) -> None:
    line = json.dumps({"prompt": "Why?", "source": "x" * 200_000}) + "\n"
    most = []
    for size in (1e6, 1e9):
        with Path("long.jsonl").open("w") as file:
            file.writelines(line for _ in range(int(size / len(line))))
        words = ("monitor", "--data", "long.jsonl", "--vector", "v.safetensors", "--model", tiny, "--out", "out.jsonl")
        process = start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = status
        assert status == 0
        most.append(used.ru_maxrss / 1024)

    assert most[1] - most[0] < 50


@pytest.mark.slow
def test_heat(cli: Cli, monitor: Callable[..., Monitor], tiny: Path) -> None:
    common = ("monitor", "<b>Why & how?", "So?", "--vector", "v.safetensors", "--model", tiny)
    for name in ("heat.html", "heat.png", "heat.svg"):
        ended = cli(*common, "--heat", name)
        assert (ended.code, ended.err) == (0, f"wrote {name}\n")
    page = Path("heat.html").read_text()
    assert "src=" not in page
    assert "http" not in page
    shown = monitor().heat("<b>Why & how?")
    assert page.count("<span") == len(shown.tokens) + len(monitor().heat("So?").tokens)
    assert "&lt;b&gt;" in page or ("&lt;" in page and "&gt;" in page)
    assert "<b>" not in page
    for value in shown.values.tolist():
        assert f'title="{value - monitor().middle():+.3f}"' in page
    assert Path("heat.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("heat.svg").read_text()
    assert cli(*common, "--heat", "heat.txt").err.startswith("error: heat.txt: a picture is")


def test_shift_of_a_checkpoint_and_of_an_adapter(
    answer: Callable[..., Any], cli: Cli, monitor: Callable[..., Monitor], tiny: Path
) -> None:
    import warnings

    from peft import LoraConfig, get_peft_model

    model, tokenizer = steerkit.load_model(str(tiny))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
        adapted.save_pretrained("adapter")
        merged = adapted.merge_and_unload()
    merged.save_pretrained("tuned")
    tokenizer.save_pretrained("tuned")
    baseline, _ = steerkit.load_model(str(tiny))
    expected = steerkit.finetuning_shift(baseline, merged, tokenizer, PROMPTS, SteeringVector.load("v.safetensors"))
    words = ("monitor", *PROMPTS, "--vector", "v.safetensors", "--model", tiny, "--after")
    for after in ("tuned", "adapter"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = answer(*words, after)
        torch.testing.assert_close(values(found["items"], "shift"), expected.values, rtol=1e-3, atol=1e-3)
        assert list(found["summary"]["shift"].values()) == pytest.approx(list(expected.estimate), abs=1e-3)
    ended = cli(*words, "tuned", "--out", "shift.jsonl")
    assert [json.loads(line)["prompt"] for line in Path("shift.jsonl").read_text().splitlines()] == PROMPTS
    assert f"{expected.estimate.mean:+.3f}" in plain(ended.out)
    assert width(ended.out.split("\n")) <= WIDTH
    Path("adapter/adapter_model.safetensors").write_bytes(b"")
    assert cli(*words, "adapter").err.startswith("error: adapter: this adapter cannot be put on the model")


def test_the_share_of_finetuning(
    answer: Callable[..., Any], cli: Cli, monitor: Callable[..., Monitor], tiny: Path
) -> None:
    from tests.tuning.pairs import finetuned

    base, tokenizer = steerkit.load_model(str(tiny))
    tuned = finetuned(base)
    tuned.save_pretrained("tuned")
    tokenizer.save_pretrained("tuned")
    expected = steerkit.tuning.contribution(tuned, base, tokenizer, PROMPTS)
    words = ("monitor", *PROMPTS, "--tuning-contribution", "--model", tiny, "--after", "tuned")
    found = answer(*words)
    torch.testing.assert_close(values(found["items"], "tuning_contribution"), expected.values, rtol=1e-4, atol=1e-5)
    assert found["summary"]["profile"] == pytest.approx(expected.profile.tolist(), abs=1e-5)
    assert found["summary"]["unit"] == "share, L1 norm"
    ended = cli(*words, "--column", "tuco", "--out", "tuco.jsonl")
    assert [json.loads(line)["tuco"] for line in Path("tuco.jsonl").read_text().splitlines()] == pytest.approx(
        expected.values.tolist(), abs=1e-5
    )
    assert f"{float(expected.profile[2]):.3f}" in ended.out
    assert width(ended.out.split("\n")) <= WIDTH


def test_difference(answer: Callable[..., Any], cli: Cli, monitor: Callable[..., Monitor], tiny: Path) -> None:
    words = ("monitor", "--data", "items.jsonl", "--vector", "v.safetensors", "--model", tiny, "--difference")
    vector, loaded = SteeringVector.load("v.safetensors"), steerkit.load_model(str(tiny))
    for more, options in ((("--max-new-tokens", 4), {"max_new_tokens": 4}), (("--cheap",), {"cheap": True})):
        expected = steerkit.projection_difference(*loaded, ITEMS, vector, **options)
        found = answer(*words, *more)
        name = "projection_difference"
        torch.testing.assert_close(values(found["items"], name), expected.values, rtol=1e-3, atol=1e-3, equal_nan=True)
        assert found["summary"]["mean"]["mean"] == pytest.approx(expected.estimate.mean, abs=1e-3)
        own = [row.get("own_response") for row in found["items"]]
        assert own == ([None] * 5 if expected.answers is None else list(expected.answers))
    ended = cli(*words, "--max-new-tokens", 4, "--out", "out.jsonl", "--column", "far")
    assert ended.code == 0
    assert json.loads(Path("out.jsonl").read_text().split("\n")[0])["far"] is not None
    assert len(Path("out.jsonl.own.jsonl").read_text().splitlines()) == 5  # so that a killed run goes on
    assert "AUC of label" in ended.out


def test_a_stream_s_items_come_from_stdin_here_too(
    cli: Cli, monitor: Callable[..., Monitor], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('\n"Why?"\n'))
    ended = cli("monitor", "--data", "-", "--vector", "v.safetensors", "--model", tiny)
    assert json.loads(ended.out)["projection"] == pytest.approx(float(monitor().score(["Why?"])), abs=1e-4)


def test_what_is_wrong_with_a_line_of_a_stream_is_its_answer(
    cli: Cli, monitor: Callable[..., Monitor], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        b'"Why?"',
        b"\xff\xfe",
        b'{"id": 7, "body": "Why?"}',
        b'{"id": 8, "prompt": "Why?", "joy": 1}',
        b'{"prompt": "Why?", "response": 5}',
        b"7",
        b'{"instruction": "Why?"}',
    ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), encoding="utf-8"))
    words = ("--vector", "v.safetensors", "--model", tiny, "--column", "joy", "--raw")
    ended = cli("monitor", "--data", "-", *words)
    assert (ended.code, ended.err) == (0, "")
    found = [json.loads(line) for line in ended.out.splitlines()]
    assert [row.get("line") for row in found] == [None, 2, 3, 4, 5, 6, None]
    assert [row.get("id") for row in found] == [None, None, 7, 8, None, None, None]
    assert [row.get("error", "").partition(";")[0] for row in found] == [
        "",
        "byte 1 is not UTF-8",
        "give 'prompt' or 'messages', or name its column (--columns prompt=NAME)",
        "the item has a key 'joy'",
        "answer: expected a string, got 5",
        "prompt: expected a string or a list of messages, got 7",
        "",
    ]
    assert found[0]["joy"] == found[6]["joy"] == pytest.approx(float(monitor().score(["Why?"], raw=True)), abs=1e-4)


def test_items_of_other_formats(answer: Callable[..., Any], monitor: Callable[..., Monitor], tiny: Path) -> None:
    Path("items.csv").write_text(
        'ask,response,score,label\nHow are you?,"Fine, thank you.",10,true\nWhy?,Because.,35.5,false\n'
    )
    words = ("--vector", "v.safetensors", "--model", tiny, "--columns", "prompt=ask", "--read", "response_mean")
    found = answer("monitor", "--data", "items.csv", *words)
    scores = monitor(read="response_mean").score(ITEMS[:2])
    torch.testing.assert_close(values(found["items"]), scores, rtol=1e-4, atol=1e-5)
    assert found["items"][1]["ask"] == "Why?"
    assert found["summary"]["auc_of_label"] is not None
    turns: Any = ITEMS[2]["messages"]
    exported = [turns[0], {**turns[1], "annotations": [], "refusal": None}]
    Path("chats.json").write_text(json.dumps([{"messages": exported}], indent=1))
    found = answer("monitor", "--data", "chats.json", "--vector", "v.safetensors", "--model", tiny)
    torch.testing.assert_close(values(found["items"]), monitor().score([ITEMS[2]]), rtol=1e-4, atol=1e-5)


def test_labels_may_be_numbers(answer: Callable[..., Any], monitor: Callable[..., Monitor], tiny: Path) -> None:
    rows = [{"prompt": prompt, "label": label} for prompt, label in (("Why?", 1), ("How?", 0), ("Who?", 1), ("So?", 2))]
    Path("labels.jsonl").write_text(jsonl(rows))
    found = answer("monitor", "--data", "labels.jsonl", "--vector", "v.safetensors", "--model", tiny)["summary"]
    scores = monitor().score([row["prompt"] for row in rows])
    assert found["auc_of_label"]["mean"] == pytest.approx(separability(scores[[0, 2]], scores[[1]]).mean, abs=1e-3)


def test_what_could_not_be_read_is_told(answer: Callable[..., Any], cli: Cli, here: Path, tiny: Path) -> None:
    common = ("--vector", "v.safetensors", "--model", tiny, "--read", "response_mean")
    rows = [{"prompt": "Hi", "response": "ok"}, {"prompt": "Hi", "response": ""}, {"prompt": "Ho", "response": "so"}]
    Path("some.jsonl").write_text(jsonl(rows))
    Path("none.jsonl").write_text(jsonl(rows[1:2]))
    found = answer("monitor", "--data", "some.jsonl", *common, "--after", tiny)["summary"]
    assert (found["items"], found["scored"]) == (3, 2)
    ended = cli("monitor", "--data", "some.jsonl", *common, "--after", tiny)
    assert "means over 2 items; 95 % interval of the shift (1 of 3 items have no" in " ".join(plain(ended.out).split())
    for words in (("Why?",), ("--data", "none.jsonl"), ("--data", "none.jsonl", "--after", tiny)):
        ended = cli("monitor", *words, *common, "--out", "out.jsonl")
        assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
        assert "error: none of 1 items has a response to read" in ended.err
        assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("Why?", "--vector", "v.safetensors", "--after", "tuned", "--column", "joy"), 2, "--column names the one new"),
        (("Why?", "--vector", "v.safetensors", "--column", "messages"), 2, "--column messages: items have a key"),
        (("--data", "kept.jsonl", "--vector", "v.safetensors", "--column", "id"), 2, "--column id: items have a key"),
        (
            ("--data", "kept.jsonl", "--vector", "v.safetensors", "--difference", "--read", "prompt_last"),
            2,
            "leave out --read",
        ),
        (("Why?", "--vector", "v.safetensors", "--max-new-tokens", "4"), 2, "--max-new-tokens is the length of own"),
        (("Why?",), 2, "give --vector"),
        (("Why?", "--tuning-contribution"), 2, "give it with --after"),
        (("Why?", "--tuning-contribution", "--after", "tuned", "--cheap"), 2, "leave out --cheap"),
        (("--vector", "v.safetensors"), 2, "give prompts, or a file"),
        (("Why?", "--data", "x.jsonl", "--vector", "v.safetensors"), 2, "give prompts, or a file"),
        (("Why?", "--vector", "v.safetensors", "--difference"), 2, "--difference compares"),
        (("Why?", "--vector", "v.safetensors", "--cheap"), 2, "--cheap is a form"),
        (("--data", "-", "--vector", "v.safetensors", "--json"), 2, "line by line"),
        (("Why?", "--vector", "v.safetensors", "--after", "tuned", "--raw"), 2, "--raw and --heat stand with"),
        (("--data", "none.jsonl", "--vector", "v.safetensors"), 1, "error: none.jsonl: cannot read the file"),
        (("--data", "empty.jsonl", "--vector", "v.safetensors"), 1, "error: empty.jsonl: the file holds no item"),
        (("--data", "wrong.jsonl", "--vector", "v.safetensors"), 1, "error: wrong.jsonl, line 2: give 'prompt' or"),
        (("--data", "number.jsonl", "--vector", "v.safetensors"), 1, "error: number.jsonl, line 1:"),
        (("Why?", "--vector", "nonsense"), 1, "error: unknown vector 'nonsense'"),
        (("Why?", "--vector", "v.safetensors", "--heat", "."), 1, "error: .: is a folder"),
        (("Why?", "--vector", "v.safetensors", "--after", "./none"), 1, "error: ./none: no such folder"),
    ],
)
def test_mistakes(cli: Cli, here: Path, tiny: Path, words: Any, code: int, message: str) -> None:
    Path("kept.jsonl").write_text('{"prompt": "Why?", "id": 1}\n')
    Path("empty.jsonl").write_text("\n")
    Path("wrong.jsonl").write_text('{"prompt": "Why?"}\n{"body": "Why?"}\n')
    Path("number.jsonl").write_text("7\n")
    ended = cli("monitor", *words, "--model", tiny)
    assert (ended.code, ended.out) == (code, "")
    assert message in plain(ended.err)
    if code == 1:
        assert ended.err.count("\n") == 1
