"""What clients and machines do wrong: the other rows go on, and the rows of those who are gone are freed."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steerkit.cli._program import _notes
from steerkit.serve import Request
from steerkit.serve.settings import Settings
from tests.serve.asked import TOKENIZER, alone, chat, model_of
from tests.serve.spoken import Served, served, slowly

CHAT = "/v1/chat/completions"
LONG = {"messages": chat("Tell me of the sea."), "max_tokens": 40, "temperature": 0, "steering": "b@all*0.7"}


class Beside:
    """A long answer that is under way while something happens to another one."""

    def __init__(self, server: Served, **headers: str) -> None:
        self._found: list[tuple[int, str]] = []
        self._thread = threading.Thread(target=lambda: self._found.append(server.post(CHAT, LONG, **headers)))

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.join(60)
        if error == (None, None, None):
            asked = Request(LONG["messages"], steering="b@all*0.7", max_tokens=40)  # type: ignore[arg-type]
            expected = TOKENIZER.decode(alone("llama", asked), skip_special_tokens=True)
            (status, text), *_ = self._found
            assert status == 200, text
            assert json.loads(text)["choices"][0]["message"]["content"] == expected


@pytest.fixture
def server() -> Iterator[Served]:
    with served(max_tokens=200) as one:
        yield one


CLIENT = """
import socket, sys
line = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
line.sendall(sys.stdin.buffer.read())
while True:
    data = line.recv(1)
    sys.stdout.write("."); sys.stdout.flush()
"""


def raw(path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_is_killed(server: Served, stream: bool) -> None:
    body = {**LONG, "max_tokens": 200, "stream": stream, "steering": "a"}
    port = server.address.rpartition(":")[2]
    with slowly(), Beside(server):
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", CLIENT, port], **options) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            client.stdin.write(raw(CHAT, body))
            client.stdin.close()
            if stream:
                assert client.stdout.read(200)
            else:
                while server.engine.running < 2:
                    time.sleep(0.01)
            client.kill()
        start = time.monotonic()
        while server.engine.running > 1:
            assert time.monotonic() < start + 2, "the row of a client that is gone runs on"
            time.sleep(0.01)
    server.until_idle()


def test_a_reader_is_slow(server: Served) -> None:
    body = {**LONG, "max_tokens": 60, "stream": True, "logprobs": True, "top_logprobs": 20, "n": 8}
    with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2]))) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        line.sendall(raw(CHAT, body))
        with Beside(server):
            pass
        server.until_idle()  # its rows end, though nobody reads them
    assert server.get("/health")[0] == 200


def test_a_prompt_is_far_too_long(server: Served) -> None:
    with slowly(), Beside(server):
        status, error = server.error(CHAT, {"messages": chat("x" * 10 * 2**20)})
        assert (status, error["code"]) == (413, "request_too_large")
        status, error = server.error(CHAT, {"messages": chat("x" * 2**20)})
        assert status == 400
        assert "the model takes" in error["message"]


WRONG = (
    b"",
    b"{",
    b"[1, 2]",
    b'"Hi"',
    b'{"messages": NaN}',
    b"[" * 100_000,
    b"\xff\xfe",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
)


def test_bodies_are_no_json(server: Served) -> None:
    with slowly(), Beside(server):
        for body in WRONG:
            status, error = server.error(CHAT, body)
            assert status == 400, body
            assert error["type"] == "invalid_request_error"


def test_keys_are_wrong() -> None:
    with served(Settings("tiny", api_key="sésame")) as server:
        right = "Bearer sésame".encode().decode("latin-1")
        with slowly(), Beside(server, Authorization=right):
            for headers in (
                {},
                {"Authorization": "Bearer no"},
                {"Authorization": "sesame"},
                {"Authorization": "Basic x"},
            ):
                status, error = server.error(CHAT, {"messages": chat("Hi")}, **headers)
                assert (status, error["code"]) == (401, "invalid_api_key")
        assert server.get("/metrics")[0] == 401
        assert server.get("/health")[0] == 200


def test_the_queue_is_full() -> None:
    with served(max_batch=1, max_queue=1, max_tokens=200) as server, slowly():
        first = threading.Thread(target=server.post, args=(CHAT, {**LONG, "max_tokens": 60}))
        first.start()
        while not server.engine.running:
            time.sleep(0.01)
        with Beside(server):
            while not server.engine.waiting:
                time.sleep(0.01)
            status, error = server.error(CHAT, LONG)
            assert (status, error["code"]) == (429, "queue_full")
        first.join()


def test_the_disk_is_full(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged of a pass that failed can be written nowhere."""

    def fail(_module: Any, _args: Any, kwargs: Any) -> None:
        if (kwargs["input_ids"] == 299).any():
            raise MemoryError

    handle = model_of().register_forward_pre_hook(fail, with_kwargs=True)
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115 - closing it fails as well
    try:
        with _notes(), slowly(), Beside(server):
            monkeypatch.setattr(sys, "stderr", full)
            status, error = server.error("/v1/completions", {"prompt": [5, 299], "max_tokens": 2})
            assert (status, error["code"]) == (500, "generation_failed")
            monkeypatch.undo()
    finally:
        handle.remove()
        with contextlib.suppress(OSError):
            full.close()
