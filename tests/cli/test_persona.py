"""`steerkit persona`, as somebody meets it: drafts, an extraction, every mistake, kills and Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerkit._support.endpoint import KEYS
from steerkit.cli import app
from steerkit.persona.traits import TraitSpec
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector
from tests.evaluate.test_judge import Server, completion, failure
from tests.persona.test_persona import TRAIT
from tests.persona.test_traits import PAIRS, QUESTIONS, SCALE
from tests.program import ROOT, WIDTH, Cli, plain, start, strict_json, width

EXTRACT = ("persona", "extract", "glad.toml", "--max-new-tokens", 6, "--margin", "-1000", "--layers", "1-2")
FREE = ("--max-kl", "1e9", "--max-ppl-ratio", "1e9")


# Random texts differ in where they begin, and are warned of; the commands show that on stderr.
pytestmark = pytest.mark.filterwarnings("default:.*predicts the label:UserWarning")


@pytest.fixture(autouse=True)
def no_keys_no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def trait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a specification in it."""
    monkeypatch.chdir(tmp_path)
    TRAIT.save("glad.toml")
    return tmp_path


@pytest.fixture
def serve() -> Iterator[Callable[[Any], Server]]:
    servers: list[Server] = []

    def begin(reply: Any) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


def fits(text: str) -> bool:
    """Nothing is wider than a terminal, but for paths and commands to copy."""
    return width(line for line in text.split("\n") if "steerkit " not in line and "wrote " not in line) <= WIDTH


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["draft", "extract"])
def test_help(cli: Cli, command: str) -> None:
    ended = cli("persona", command, "--help")
    assert ended.code == 0
    assert "--json" in plain(ended.out)
    assert "\u2026" not in ended.out, "no option's name is cut off"
    assert width(ended.out.split("\n")) <= WIDTH
    assert "persona" in cli("--help").out
    assert "persona" in [group.name for group in app.registered_groups]


def test_help_loads_no_model_library() -> None:
    code = """
import contextlib, io, sys
from steerkit.cli import app
for words in ["persona --help", "persona draft --help", "persona extract --help"]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        app(words.split())
    assert not {"torch", "transformers", "numpy", "datasets"} & set(sys.modules), words
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- draft -----------------------------------------------------------------------------------------------------------


def test_a_draft_without_a_model_says_what_to_fill_in(cli: Cli, answer: Callable[..., Any], trait: Path) -> None:
    ended = cli("persona", "draft", "Dry humoured", "--description", "It jokes with a straight face.")
    assert (ended.code, ended.err) == (0, "")
    assert fits(ended.out)
    spec = TraitSpec.load("dry-humoured.toml")
    assert (spec.trait, spec.description) == ("Dry humoured", "It jokes with a straight face.")
    for words in (
        "wrote dry-humoured.toml",
        "52 places",
        "instructions 1 to 5 (5)",
        "questions 1 to 40 (40)",
        "rubric",
    ):
        assert words in ended.out
    ended = cli("persona", "extract", "dry-humoured.toml")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: dry-humoured.toml: 52 places are still to be filled in (rubric; instruction 1,")
    assert "steerkit persona draft 'Dry humoured' --endpoint URL#MODEL --out NEW.toml" in ended.err
    assert ended.err.count("\n") == 1
    ended = cli("persona", "draft", "Dry humoured")
    assert (ended.code, ended.err) == (
        1,
        "error: dry-humoured.toml: is there already; choose another --out, or replace it with --force\n",
    )
    found = answer("persona", "draft", "Dry humoured", "--force", "--out", "dry-humoured.toml")
    assert (found["file"], len(found["open"])) == ("dry-humoured.toml", 53)


def author(mangle: Callable[[str, int], str] = lambda text, number: text) -> Callable[[dict[str, Any], int], Any]:
    """What an endpoint that writes drafts replies."""
    parts = {"opposite of": {"opposite": "sad"}, "pairs of": PAIRS, "questions or": QUESTIONS, "will rate": SCALE}

    def reply(asked: dict[str, Any], number: int) -> Any:
        prompt = asked["messages"][0]["content"]
        part = next(content for words, content in parts.items() if words in prompt)
        return completion(mangle(json.dumps(part), number))

    return reply


def test_an_endpoint_writes_a_draft(
    cli: Cli, trait: Path, serve: Callable[[Any], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEYS[0], "sk-secret")
    server = serve(author())
    words = ("persona", "draft", "merry", "--description", "It laughs.", "--endpoint", f"{server.url}#writer")
    ended = cli(*words)
    assert (ended.code, ended.err) == (0, "")
    assert fits(ended.out)
    assert "read it over" in ended.out
    assert "steerkit persona extract merry.toml" in ended.out
    spec = TraitSpec.load("merry.toml")
    assert spec.open_places == ()
    assert (spec.assistants, spec.questions) == (("merry", "sad"), tuple(QUESTIONS[:40]))
    assert [asked["model"] for asked in server.requests] == ["writer"] * 4
    assert all("merry" in asked["messages"][0]["content"] for asked in server.requests)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-secret"}


def test_malformed_replies_are_asked_again_and_what_is_missing_is_told(
    cli: Cli, trait: Path, serve: Callable[[Any], Server]
) -> None:
    server = serve(author(lambda text, number: text if number % 2 else f"```json\n{text[: len(text) // 2]}"))
    ended = cli("persona", "draft", "merry", "--description", "It laughs.", "--endpoint", f"{server.url}#writer")
    assert ended.code == 0, ended
    assert len(server.requests) > 4
    useless = serve(lambda asked, number: completion("I would rather not."))
    ended = cli("persona", "draft", "dull", "--endpoint", f"{useless.url}#writer", "--json")
    assert (ended.code, ended.err) == (1, "")
    assert len(strict_json(ended.out)["open"]) == 53
    assert TraitSpec.load("dull.toml").open_places


def test_an_endpoint_that_cannot_be_used(cli: Cli, trait: Path, serve: Callable[[Any], Server]) -> None:
    server = serve(lambda asked, number: failure(401, "no such key sk-x"))
    ended = cli("persona", "draft", "merry", "--endpoint", f"{server.url}#writer")
    assert ended.code == 1
    assert f"error: writer writer at {server.url}: HTTP 401, the key is missing or refused; set {KEYS[0]}" in ended.err
    assert "sk-x" not in ended.err
    ended = cli("persona", "draft", "merry", "--endpoint", server.url)
    assert f"writer at {server.url}: no model is named" in ended.err
    ended = cli("persona", "draft", "merry", "--endpoint", "nowhere#m")
    assert "error: writer: the url is no address of an endpoint" in ended.err
    nothing = serve(lambda asked, number: (200, {"choices": []}))
    ended = cli("persona", "draft", "merry", "--endpoint", f"{nothing.url}#writer")
    assert "the reply is no chat completion; check the url" in ended.err
    assert not Path("merry.toml").exists()


def test_what_was_written_is_kept_when_the_endpoint_fails(
    cli: Cli, trait: Path, serve: Callable[[Any], Server]
) -> None:
    write = author()
    server = serve(
        lambda asked, number: failure(404, "gone") if "will rate" in str(asked["messages"]) else write(asked, number)
    )
    ended = cli("persona", "draft", "merry", "--description", "It laughs.", "--endpoint", f"{server.url}#writer")
    assert ended.code == 1
    assert "HTTP 404 (gone); merry.toml keeps what was written until then" in ended.err
    assert "wrote merry.toml" in ended.out
    spec = TraitSpec.load("merry.toml")
    assert (spec.open_places, spec.questions) == (("rubric",), tuple(QUESTIONS[:40]))


def test_the_opposite_has_another_name(cli: Cli, trait: Path, serve: Callable[[Any], Server]) -> None:
    server = serve(author(lambda text, number: text.replace("sad", " Merry") if not number else text))
    ended = cli("persona", "draft", "merry", "--description", "It laughs.", "--endpoint", f"{server.url}#writer")
    assert ended.code == 0
    assert TraitSpec.load("merry.toml").assistants == ("merry", "sad")


def test_a_local_model_writes_a_draft(cli: Cli, trait: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reply, asked = author(), []

    def generate(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> list[str]:
        asked.append(options["seed"])
        _, body = reply({"messages": [{"content": prompts[0].prompt}]}, 0)
        return [body["choices"][0]["message"]["content"]]

    monkeypatch.setattr("steerkit.persona.writers.generate", generate)
    ended = cli("persona", "draft", "merry", "--description", "It laughs.", "--model", tiny)
    assert (ended.code, ended.err) == (0, "")
    assert TraitSpec.load("merry.toml").open_places == ()
    assert asked == [[0]] * 4


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("draft", "merry", "--endpoint", "x#y", "--model", "z"), 2, "--endpoint and --model both write it"),
        (("draft", "merry", "--out", "merry.json"), 2, "a trait specification is a .toml file"),
        (("draft", " "), 1, "trait: is empty; write it"),
        (("extract", "optimstic"), 1, "unknown trait 'optimstic'; did you mean 'optimistic'"),
        (("extract", "missing.toml"), 1, "missing.toml: cannot be read"),
        (("extract", "glad.toml", "--readout", "last"), 1, "persona vectors are read from response_mean, prompt_mean"),
        (("extract", "glad.toml", "--samples", "0"), 2, "--samples"),
        (("extract", "glad.toml", "--threshold", "nan"), 2, "nan is no finite number; give one"),
        (("extract", "glad.toml", "--judge", "http://x"), 1, "no model is named"),
        (("extract", "glad.toml", "--out", "glad.toml"), 1, "glad.toml"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    cli: Cli, trait: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, told: str
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr("steerkit.load_model", refuse, raising=False)
    ended = cli("persona", *words)
    assert ended.code == code, ended
    assert told in plain(ended.err)
    assert "Traceback" not in ended.err


# --- extract ---------------------------------------------------------------------------------------------------------


def test_extract(cli: Cli, trait: Path, tiny: Path) -> None:
    ended = cli(*EXTRACT, *FREE, "--model", tiny)
    assert ended.code == 0, ended.err
    assert all(line.startswith("warning: ") for line in ended.err.splitlines())
    assert fits(ended.out), ended.out
    folder = Path("glad-persona")
    vector = SteeringVector.load(folder / "glad-persona.safetensors")
    kept = len((folder / "pairs.jsonl").read_bytes().splitlines())
    assert f"{kept} of 24 pairs of answers kept; no judge: filtered by the model's own probabilities" in plain(
        ended.out
    )
    assert f"wrote {folder / 'glad-persona.safetensors'}\nwrote {folder / 'glad-monitor.safetensors'}\n" in ended.out
    assert str(vector.sites[0]) in ended.out
    assert re.search(r"took rollouts \d+ s, scores \d+ s, vector \d+ s, monitor \d+ s, card \d+ s", ended.out)
    assert f'steerkit generate "{TRAIT.held_out_questions[0]}" --vector {folder / vector.method}' not in ended.out
    assert f"--model {tiny}" in ended.out
    again = cli(*EXTRACT, *FREE, "--model", tiny, "--json")
    assert (again.code, again.err) == (0, "")
    found = strict_json(again.out)
    assert found["vector"]["digest"] == vector.digest
    assert (found["rows"], found["kept"], found["judge"]) == (24, kept, None)
    assert sum(found["pairs"].values()) == kept
    assert set(found["seconds"]) == {"rollouts", "scores", "vector", "monitor", "card"}
    other = cli(*EXTRACT, *FREE, "--model", tiny, "--samples", 2)
    assert other.code == 1
    assert "was begun with samples 1, now it is 2; give the same again, or choose another folder" in other.err


def test_the_pairs_go_into_other_commands(cli: Cli, trait: Path, tiny: Path) -> None:
    assert cli(*EXTRACT, *FREE, "--model", tiny, "--out", "made").code == 0
    words = ("extract", "--data", "made/pairs.jsonl", "--method", "persona", "--layers", "1", "--out", "x.safetensors")
    found = strict_json(cli(*words, "--model", tiny, "--json").out)  # positions tell the sides apart, which is said
    data = ContrastSet.from_jsonl("made/pairs.jsonl")
    assert found["held_out"]["items"] == sum(data.marks)
    ended = cli("evaluate", "--vector", "x.safetensors", "--data", "made/pairs.jsonl", "--controls", 1, "--model", tiny,
                "--max-new-tokens", 4, "--texts", 2, "--neutral", 2, "--strength", 1, "--json")  # fmt: skip
    assert ended.code == 0, ended.err
    assert strict_json(ended.out)["strengths"][0]["scores"]["preference_margin"]["items"] == sum(data.marks)


def test_a_judge_behind_an_endpoint(cli: Cli, trait: Path, tiny: Path, serve: Callable[[Any], Server]) -> None:
    def reply(asked: dict[str, Any], number: int) -> Any:
        prompt = asked["messages"][0]["content"]
        if "coherent" in prompt:
            return completion("80")
        return completion(str(sum(map(ord, prompt)) % 101))

    server = serve(reply)
    words = (*EXTRACT, *FREE, "--model", tiny, "--judge", f"{server.url}#rater", "--threshold", 30)
    ended = cli(*words, "--json")
    assert ended.code == 0, ended.err
    found = strict_json(ended.out)
    assert found["judge"] == "rater"
    assert 0 < found["kept"] < found["rows"]
    assert set(found["dropped"]) <= {"trait too weak", "trait on the other side", "empty answer"}
    assert "rated by rater" in plain(cli(*words).out)
    scores = Path("glad-persona/scores-judge.jsonl").read_text(encoding="utf-8")
    assert json.loads(scores.splitlines()[0])["judge"] == "rater"


# --- kills -----------------------------------------------------------------------------------------------------------

LONG = replace(TRAIT, questions=tuple(f"What about number {n}?" for n in range(20)))
ROLL = ("persona", "extract", "long.toml", "--max-new-tokens", 8, "--samples", 2, "--batch-size", 4, "--layers", "1")


def wait_for(path: Path, lines: int, process: subprocess.Popen[str]) -> None:
    """Until the file has that many whole lines."""
    for _ in range(12000):
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.005)
    pytest.fail("no such line in a minute")


def stopped(words: tuple[object, ...], lines: int, sign: int) -> int:
    """Start a run and stop it when its file of rollouts has so many lines; gives the exit code."""
    process = start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_for(Path("stopped/rollouts.jsonl"), lines, process)
        process.send_signal(sign)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in told
    return int(process.returncode)


@pytest.mark.slow  # six processes
def test_a_run_that_is_stopped_again_and_again_goes_on(cli: Cli, trait: Path, tiny: Path) -> None:
    LONG.save("long.toml")
    words = (*ROLL, *FREE, "--margin", "-1000", "--model", tiny)
    whole = cli(*words, "--out", "whole")
    assert whole.code == 0, whole.err
    words = (*words, "--out", "stopped")
    rollouts, all_rows = Path("stopped/rollouts.jsonl"), Path("whole/rollouts.jsonl").read_bytes()
    assert stopped(words, 5, signal.SIGINT) == 130
    after_one = rollouts.read_bytes()
    assert stopped(words, after_one.count(b"\n") + 4, signal.SIGKILL) == -signal.SIGKILL
    after_two = rollouts.read_bytes()
    assert len(after_one) < len(after_two) < len(all_rows)
    assert not list(Path("stopped").glob("*.safetensors"))
    rollouts.write_bytes(after_two + b'{"held_out": fal')  # as a kill in the middle of a line leaves it
    assert cli(*words).code == 0
    for name in ("rollouts.jsonl", "pairs.jsonl", "glad.toml", "glad-persona.md"):
        assert (Path("stopped") / name).read_bytes() == (Path("whole") / name).read_bytes(), name
    vectors = [SteeringVector.load(Path(folder) / "glad-persona.safetensors") for folder in ("stopped", "whole")]
    assert vectors[0] == vectors[1]
