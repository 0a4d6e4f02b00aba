"""A judge behind an OpenAI-compatible endpoint, asked over HTTP, several requests at once."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from steerkit._support.endpoint import FILTERED, Endpoint, told
from steerkit._support.processes import from_first
from steerkit.evaluate.judges.scale import LEAST_MASS, check_scale, expected_score, may_split_numbers, parse_score

__all__ = ["EndpointJudge"]


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint (vLLM, llama.cpp, TGI, the large providers).

    Requests are greedy and seeded. Endpoints that give no log-probabilities, or refuse to be asked for them, are read
    as text by `parse_score`. The key is sent to `base_url` alone (redirects are not followed) and shown nowhere.

    Args:
        base_url: such as ``http://localhost:8000/v1``.
        model: the endpoint's name of the model.
        api_key: None takes the environment variable STEERKIT_JUDGE_KEY, else OPENAI_API_KEY; "" sends none.
        timeout: seconds without a sign of the endpoint.
        retries: further tries after time-outs, broken connections, HTTP 408, 429 and 5xx.
        backoff: seconds before the first of them; each further one waits twice as long.
        parallel: requests under way at once.
        max_tokens: length of an answer, in tokens; an answer that is cut off there is not read as text.
        least_mass: probability of all numbers together below which there is no score.

    Raises:
        SteerError: `base_url` is no plain address, the model has no name, or the key holds blanks or the like.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        parallel: int = 4,
        max_tokens: int = 16,
        least_mass: float = LEAST_MASS,
    ) -> None:
        self._endpoint = Endpoint(base_url, model, api_key, timeout=timeout, retries=retries, backoff=backoff)
        self.base_url, self.model = self._endpoint.base_url, model
        self.parallel, self.max_tokens, self.least_mass = parallel, max_tokens, least_mass
        self._gives_logprobs = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r}, {self.model!r})"

    @property
    def name(self) -> str:
        """The endpoint's name of the model."""
        return self.model

    def score(self, prompts: Sequence[str], *, low: int = 0, high: int = 10) -> list[float | None]:
        """Score every prompt; see `Judge.score`.

        Args:
            prompts: each asks for one whole number.
            low: lower end of the scale.
            high: upper end.

        Raises:
            SteerError: the endpoint refuses, cannot be reached, or answers with something else.
        """
        check_scale(low, high)
        if not prompts:
            return []
        replies = from_first(lambda: self._replies(prompts))
        return [self._read(reply, low, high) for reply in replies]

    def _replies(self, prompts: Sequence[str]) -> list[_Reply]:
        # The first alone: it finds out whether there are log-probabilities, and a wrong key fails once, not four times.
        return [self._ask(prompts[0], threading.Event()), *self._ask_all(prompts[1:])]

    def _ask_all(self, prompts: Sequence[str]) -> list[_Reply]:
        """The answers to all prompts, some of which are under way at once.

        In threads of our own: nothing waits for those, not even the interpreter's end, when one request fails or
        somebody presses Ctrl-C while the endpoint hangs.
        """
        stop, left = threading.Event(), deque((prompt, Future[_Reply]()) for prompt in prompts)
        answers = [answer for _, answer in left]

        def work() -> None:
            while not stop.is_set():
                try:
                    prompt, answer = left.popleft()
                except IndexError:
                    return
                try:
                    answer.set_result(self._ask(prompt, stop))
                except BaseException as error:  # noqa: BLE001  # raised again where it is waited for
                    answer.set_exception(error)

        for _ in range(min(self.parallel, len(prompts))):
            threading.Thread(target=work, daemon=True).start()
        try:
            return [answer.result() for answer in answers]
        finally:
            stop.set()

    def _read(self, reply: _Reply, low: int, high: int) -> float | None:
        """The score of one answer."""
        if reply.tops and not may_split_numbers(reply.tops, low, high):
            return expected_score(reply.tops, low, high, least_mass=self.least_mass)
        return None if reply.cut_off else parse_score(reply.text, low, high)

    def _ask(self, prompt: str, stop: threading.Event) -> _Reply:
        """One answer, with log-probabilities where the endpoint gives them."""
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "seed": 0,
        }
        if self._gives_logprobs:
            status, body = self._endpoint.post({**asked, "logprobs": True, "top_logprobs": 20}, stop)
            if status not in (400, 422) or told(body)[1] == FILTERED:
                return self._reply(status, body)
        status, body = self._endpoint.post(asked, stop)
        reply = self._reply(status, body)
        self._gives_logprobs = False  # only now: what was refused was the option, not the prompt
        return reply

    def _reply(self, status: int, body: bytes) -> _Reply:
        """Read a reply.

        Raises:
            SteerError: it is an error, or no chat completion.
        """
        if told(body)[1] == FILTERED:
            return _Reply([], "", cut_off=True)
        self._endpoint.check(status, body)
        try:
            return _Reply.of(body)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise self._endpoint.no_completion(body) from None


class _Reply(NamedTuple):
    """What an endpoint answered.

    Attributes:
        tops: the likeliest first tokens with their log-probabilities; empty where the endpoint gives none.
        text: the answer.
        cut_off: it is not the whole answer.
    """

    tops: list[tuple[str, float]]
    text: str
    cut_off: bool

    @classmethod
    def of(cls, body: bytes) -> _Reply:
        """Read a chat completion; whatever is missing raises as Python does."""
        choice = json.loads(body)["choices"][0]
        text = choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise TypeError("content")
        tokens = (choice.get("logprobs") or {}).get("content") or [{}]
        tops = [(str(top["token"]), float(top["logprob"])) for top in tokens[0].get("top_logprobs") or []]
        return cls(tops, text, choice.get("finish_reason") in ("length", FILTERED))
