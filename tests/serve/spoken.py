"""A server that runs in a thread, and plain requests to it."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from steerkit.serve import Engine
from steerkit.serve.running import bound, running
from steerkit.serve.settings import Settings
from tests.serve.asked import engine_of, model_of

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Served(NamedTuple):
    """A server and what it runs."""

    address: str
    engine: Engine

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        return self._send(urllib.request.Request(self.address + path, headers=headers))

    def post(self, path: str, body: Mapping[str, Any] | bytes, **headers: str) -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **headers}
        return self._send(urllib.request.Request(self.address + path, data=data, headers=given))

    def events(self, path: str, body: Mapping[str, Any]) -> list[Any]:
        status, text = self.post(path, body)
        assert status == 200, text
        lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def error(self, path: str, body: Mapping[str, Any] | bytes, **headers: str) -> tuple[int, Any]:
        status, text = self.post(path, body, **headers)
        return status, json.loads(text)["error"]

    def until_idle(self, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while self.engine.running or self.engine.waiting:
            assert time.monotonic() < end, "rows are left"
            time.sleep(0.01)

    @staticmethod
    def _send(asked: urllib.request.Request) -> tuple[int, str]:
        try:
            with DIRECT.open(asked, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@contextlib.contextmanager
def served(settings: Settings | None = None, **options: Any) -> Iterator[Served]:
    with engine_of(**options) as engine, bound("127.0.0.1", 0) as listening:  # noqa: SIM117
        with running(engine, settings or Settings("tiny"), listening) as address:
            yield Served(address, engine)


@contextlib.contextmanager
def slowly(seconds: float = 0.02) -> Iterator[None]:
    """Let every pass of the model take its time, so that answers are under way while something happens."""
    handle = model_of().register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        handle.remove()
