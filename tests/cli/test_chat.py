"""`steerkit chat`, through a pipe and at a terminal."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import steerkit
from steerkit.cli._chat_commands import COMMANDS
from steerkit.cli._chat_view import show
from steerkit.serve.events import Answer, Token
from tests.program import WIDTH, Cli, plain, start, strict_json, width

Said = tuple[int, list[str], list[str]]
Chat = Callable[..., Said]
NEW = 6


@pytest.fixture
def chat(cli: Cli, here: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Talk to the tiny model in this process; gives the exit code and the lines on stdout and stderr."""

    def run(lines: str, *words: object) -> Said:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        ended = cli("chat", "--model", tiny, "--max-new-tokens", NEW, *words)
        return ended.code, ended.out.split("\n")[:-1], ended.err.splitlines()

    return run


def rows(said: Said) -> list[Any]:
    assert (said[0], said[2]) == (0, [])
    return [strict_json(line) for line in said[1]]


def answered(tiny: Path, prompt: Any, steering: str | None = None, **options: Any) -> str:
    model, tokenizer = steerkit.load_model(str(tiny), device="cpu")
    (text,) = steerkit.generate(model, tokenizer, [prompt], vector=steering, max_new_tokens=NEW, **options)
    return text


def test_lines_are_answered_one_by_one(chat: Chat, tiny: Path) -> None:
    steering = "v.safetensors*1.5"
    first, second = rows(chat("Hello\n\nWhy?", "--vector", "v.safetensors", "--json"))
    assert first["text"] == answered(tiny, "Hello", steering)
    history = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "Why?"},
    ]
    assert (second["prompt"], second["text"]) == (history, answered(tiny, history, steering))
    assert first["steering"] == steering
    assert first.keys() == {"prompt", "text", "steering", "finish", "temperature", "seed"}


def test_without_a_terminal_stdout_has_the_answers_alone(chat: Chat, tiny: Path) -> None:
    code, out, err = chat("/steering v.safetensors*2\nHello\n/quit\nnever asked\n")
    assert (code, "\n".join(out), err) == (0, answered(tiny, "Hello", "v.safetensors*2"), ["steering: v.safetensors*2"])


def test_two_columns_from_one_batch(chat: Chat, tiny: Path) -> None:
    code, out, _ = chat("/compare\nHello\n", "--steering", "v.safetensors*3")
    steered, baseline = (answered(tiny, "Hello", one) for one in ("v.safetensors*3", None))
    assert (code, "\n".join(out)) == (0, f"plain: {baseline}\nsteered: {steered}")
    # Each column goes on with what it has said itself.
    both = rows(chat("Hello\nWhy?\n", "--compare", "--steering", "v.safetensors*3", "--json"))
    own = [both[1]["prompt"][0], {"role": "assistant", "content": baseline}, both[1]["prompt"][2]]
    assert both[1]["baseline"] == answered(tiny, own)


def test_drawn_answers_come_again(chat: Chat, tiny: Path) -> None:
    (row,) = rows(chat("Hello\n", "--temperature", 1.3, "--seed", 4, "--json"))
    assert row["text"] == answered(tiny, "Hello", do_sample=True, temperature=1.3, seed=[4])


def test_commands_change_what_comes_next(chat: Chat) -> None:
    lines = [
        "/strength 1",
        "/vector v.safetensors",
        "/strength -0.5",
        "/strength v.safetensors 2",
        "/steering v.safetensors*1.5 - v.safetensors[2:]*0.5",
        "/strength 2",
        "/steering gone.safetensors",
        "/steering v.safetensors@anser",
        "/steering",
        "/steering off",
        "/system Be brief.",
        "/system",
        "/system off",
        "/compare maybe",
        "/strenght 2",
        "/vector",
        "/reset",
        "/save",
        "/save x.jsonl",
    ]
    code, out, err = chat("\n".join(lines))
    line = "steering: v.safetensors*1.5 - v.safetensors[2:]*0.5"
    wanted = [
        "error: nothing is steered; name a vector with /vector first",
        "steering: v.safetensors*1.5",
        "steering: - v.safetensors*0.5",
        "steering: v.safetensors*2",
        line,
        "error: several vectors steer; say which: /strength v.safetensors 2",
        "error: steering, column 1: gone.safetensors",
        "error: steering 'v.safetensors@anser', column 14: unknown scope 'anser'",
        line,
        "no steering",
        "system prompt: Be brief.",
        "system prompt: Be brief.",
        "no system prompt",
        "error: /compare: got 'maybe'; give on or off",
        "error: unknown command '/strenght'; did you mean '/strength'",
        "vectors: none is shipped for this model",
        "a new conversation",
        "error: /save: give a file",
        "error: nothing has been said yet",
    ]
    assert (code, out, len(err)) == (1, [], len(wanted))
    for said, begin in zip(err, wanted, strict=True):
        assert said.startswith(begin), said


def test_help_fits_a_terminal(chat: Chat) -> None:
    code, out, err = chat("/help\n")
    assert (code, out, [line.split()[0] for line in err]) == (0, [], [f"/{name}" for name in COMMANDS])
    assert width(err) <= WIDTH


def test_a_mistake_loses_nothing(chat: Chat, tiny: Path) -> None:
    long = "word " * 2000
    code, out, err = chat(f"Hello\n{long}\n/strength much\n//slash\n/save said.jsonl\n", "--vector", "v.safetensors")
    assert code == 1
    assert [line.split(" ")[0] for line in err] == ["error:", "error:", "saved"]
    first, second = map(strict_json, Path("said.jsonl").read_text(encoding="utf-8").splitlines())
    assert [turn["content"] for turn in second["prompt"]] == ["Hello", first["text"], "/slash"]
    assert "\n".join(out) == f"{first['text']}\n{second['text']}"


def test_what_is_saved_is_read_again(chat: Chat, tiny: Path, answer: Callable[..., Any], tmp_path: Path) -> None:
    lines = "/system Be brief.\nHello\n/save said.jsonl\nWhy?\n/save said.jsonl\n"
    assert chat(lines, "--vector", "v.safetensors")[0] == 0
    said = [strict_json(line) for line in Path("said.jsonl").read_text(encoding="utf-8").splitlines()]
    words = ("--prompts", "said.jsonl", "--steering", said[0]["steering"], "--max-new-tokens", NEW, "--model", tiny)
    assert [row["text"] for row in answer("generate", *words)] == [row["text"] for row in said]


def test_what_stands_there_is_not_overwritten(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("kept.txt").write_text("mine")
    code, _, err = chat("Hello\n/save kept.txt\n/save kept.txt/x\n")
    assert (code, Path("kept.txt").read_text()) == (1, "mine")
    assert err[0] == "error: kept.txt: is there already; choose another name"
    assert err[1].startswith("error: kept.txt/x: cannot be written (")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert chat("Hello\n/save said.jsonl\n")[2] == ["error: said.jsonl: cannot be written (No space left on device)"]
    assert not [path for path in Path().iterdir() if "said" in path.name or "tmp" in path.name]


def test_errors_before_the_model_is_loaded(chat: Chat) -> None:
    assert chat("", "--vector", "gone.safetensors")[:2] == (1, [])
    assert chat("", "--vector", "v.safetensors", "--steering", "v.safetensors")[0] == 2


@pytest.mark.parametrize("names", [("steered",), ("plain", "steered")])
def test_a_model_moves_no_cursor(names: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    said = [Token(1, kl=0.25), Token(2, kl=0.75)]
    answering: Any = Ended({name: Answer("\x1b]0;title\x07 a\tb [bold]", said) for name in names})
    show(answering)
    shown = capsys.readouterr().out
    assert "]0;title" in shown
    assert "[bold]" in shown
    assert not {"\x1b]", "\x07"} & {shown[at : at + size] for at in range(len(shown)) for size in (1, 2)}
    assert ("mean KL 0.500 nats" in shown) == (len(names) > 1)


class Ended(NamedTuple):
    """Answers that have come already."""

    answers: dict[str, Answer]

    def __iter__(self) -> Any:
        return iter([("steered", None)])


@pytest.mark.slow
def test_through_a_pipe(here: Path, tiny: Path) -> None:
    words = ("--model", tiny, "--vector", "v.safetensors", "--max-new-tokens", 2, "--compare")
    process = start("chat", *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate("Hello\n/bogus\n", timeout=120)
    assert process.returncode == 1
    assert re.match(r"plain: .*\nsteered: ", out, re.DOTALL)
    assert "\x1b" not in err
    assert "error: unknown command '/bogus'" in err


class Terminal:
    """A chat at a terminal of 80 columns."""

    def __init__(self, *words: object) -> None:
        self._own, end = pty.openpty()
        self.process = start("chat", *words, stdin=end, stdout=end, stderr=end)
        os.close(end)
        self.seen = ""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def until(self, mark: str, seconds: float = 60) -> str:
        """What is shown from now on, up to a mark."""
        found, end = "", time.monotonic() + seconds
        while mark not in found:
            assert time.monotonic() < end, found
            if select.select([self._own], [], [], 0.1)[0]:
                try:
                    found += self._decode(os.read(self._own, 65536))
                except OSError:  # the other end is closed
                    assert mark in found, found
        self.seen += found
        return found

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupted(self) -> int:
        """The exit code after Ctrl-C; while `input` is about to wait it hears none, so there may be several."""
        for _ in range(20):
            self.interrupt()
            with contextlib.suppress(AssertionError):
                self.until("interrupted", seconds=3)
                break
        return self.process.wait(30)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)


@pytest.fixture
def talkative(here: Path, tiny: Path) -> Path:
    """The tiny model with room for an answer that is under way whenever it is interrupted."""
    shutil.copytree(tiny, "tiny")
    config = json.loads(Path("tiny/config.json").read_text())
    Path("tiny/config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    return Path("tiny")


@pytest.mark.slow  # a process of its own; its lines are tried every time, in this one
def test_at_a_terminal(talkative: Path) -> None:
    at = Terminal("--model", talkative, "--vector", "v.safetensors", "--max-new-tokens", 90_000)
    try:
        shown = at.until("\r\n> ")
        assert "steering: v.safetensors*1.5; /help tells what may be typed" in shown
        at.type("/compare\n")
        at.until("\r\n> ")
        at.type("Hello\n")
        at.until("steered")  # the head of the columns
        at.interrupt()
        shown = plain(at.until("\n> "))
        assert "stopped, mean KL" in shown
        at.type("/strength\n")
        assert "error: /strength: got ''" in at.until("\r\n> ")
        at.type("/save said.jsonl\n")
        assert "saved 1 turns in said.jsonl" in at.until("\r\n> ")
        assert at.interrupted() == 130
    finally:
        at.close()
    (turn,) = [json.loads(line) for line in Path("said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert turn["finish"] == "cancelled"
    assert turn["text"]
    assert turn["baseline"]
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", at.seen.partition("Hello")[2]).split("\n")
    assert width(part for line in lines for part in line.split("\r")) <= WIDTH


@pytest.mark.slow
def test_the_end_of_the_input_leaves(here: Path, tiny: Path) -> None:
    at = Terminal("--model", tiny, "--max-new-tokens", 2)
    try:
        at.until("\r\n> ")
        at.type("Hello\n")
        at.until("\r\n> ")
        at.type("\x04")
        assert at.process.wait(20) == 0
    finally:
        at.close()
