"""`steerkit serve` as a process: what it prints, whom it answers, and how Ctrl-C ends it."""

from __future__ import annotations

import json
import shlex
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from steerkit.serve import running
from tests.program import Cli, start

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(address: str, body: Any, key: str) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        with DIRECT.open(urllib.request.Request(address, json.dumps(body).encode(), headers), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.slow  # a process of its own; what it answers is tried every time, in this one
def test_a_process_serves_until_ctrl_c(furnished: Path, tiny: Path) -> None:
    words = ("--model", tiny, "--name", "mine", "--vector", furnished / "v.safetensors", "--steering", "v*1.5")
    with (furnished / "err").open("w") as err:
        process = start("serve", *words, "--port", 0, "--api-key", "secret", stdout=-1, stderr=err)
        with process:
            assert process.stdout is not None
            name, _, address = process.stdout.readline().split()
            tried = shlex.split(process.stdout.readline())
            assert (name, tried[:2]) == ("mine", ["curl", f"{address}/chat/completions"])
            body = {**json.loads(tried[-1]), "max_tokens": 4, "temperature": 0}
            assert ask(tried[1], body, "wrong")[0] == 401
            answers = [
                ask(tried[1], {**body, **more}, "secret") for more in ({}, {"steering": None}, {"model": "mine+v*1.5"})
            ]
            assert [status for status, _ in answers] == [200] * 3
            default, plain, named = (one["choices"][0]["message"]["content"] for _, one in answers)
            assert default == named != plain
            assert ask(tried[1], {**body, "steering": str(furnished / "v.safetensors")}, "secret")[0] == 400
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
    assert "stopped" in (furnished / "err").read_text()


def test_an_answer_on_trial(answer: Callable[..., Any], tiny: Path) -> None:
    found = answer("serve", "--check", "--port", 0, "--model", tiny, "--name", "mine")
    assert found["model"] == "mine"
    assert found["address"].startswith("http://127.0.0.1:")
    assert isinstance(found["answer"], str)


def test_other_machines_need_a_key(cli: Cli) -> None:
    ended = cli("serve", "--host", "0.0.0.0")
    assert ended.code == 2
    assert "give an --api-key too" in " ".join(ended.err.replace("│", " ").split())
    assert cli("serve", "--api-key", "").code == 2


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(cli: Cli) -> None:
    with running.bound("127.0.0.1", 0) as taken:
        ended = cli("serve", "--port", taken.getsockname()[1])
    assert ended.code == 1
    assert "cannot be listened at" in ended.err
    assert "give another --host or --port" in ended.err


def test_a_missing_extra_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    ended = cli("serve")
    assert (ended.code, ended.err) == (1, "error: serving needs uvicorn; pip install 'steerkit-hf[serve]'\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--vector", "gone.safetensors"), "gone.safetensors"),
        (("--steering", "nobody*1"), "unknown vector 'nobody'"),
        (("--steering", "optimism-caa*"), "a strength stands"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(cli: Cli, words: tuple[str, ...], says: str) -> None:
    ended = cli("serve", *words)
    assert ended.code == 1
    assert says in ended.err
    assert ended.err.count("\n") == 1
