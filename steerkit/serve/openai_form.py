"""OpenAI's requests and answers, as plain data: chat completions, completions, models.

What of their fields is taken, what has no effect, and what is refused stands in docs/reference/server.md.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from steerkit.serve.body import Fields, asked_model
from steerkit.serve.events import Answer, Done, Piece, Token
from steerkit.serve.request import Request
from steerkit.serve.settings import RefusedError, Settings

__all__ = ["Asked", "OpenAIForm", "read_chat", "read_completion"]


@dataclass(frozen=True)
class Asked:
    """What a body asks for.

    Attributes:
        requests: one for each prompt.
        stream: send pieces as they come.
        usage: tell at the end of a stream how many tokens there were.
    """

    requests: tuple[Request, ...]
    stream: bool
    usage: bool


def read_chat(fields: Fields, settings: Settings) -> Asked:
    """A body of `/v1/chat/completions`.

    Args:
        fields: of the body.
        settings: of the server.

    Raises:
        RefusedError: a field that is wrong, or that cannot be followed.
        SteerError: a value that is out of its range, or no composition.
    """
    messages = fields.messages()
    wants = fields.take("logprobs", bool, False)
    top = fields.take("top_logprobs", int)
    if top is not None and not wants:
        raise RefusedError(400, "top_logprobs: give it beside logprobs=true", param="top_logprobs")
    longest = fields.take("max_completion_tokens", int)
    tools = fields.take("tools", list)
    fields.unused("tool_choice", lambda value: value == "auto" or (value == "none" and not tools), _NO_CHOICE)
    fields.unused("response_format", lambda value: value == {"type": "text"}, "answers are text")
    fields.unused("parallel_tool_calls", lambda _: True, "")
    request = Request(
        messages,
        logprobs=(top or 0) if wants else None,
        max_tokens=longest,
        tools=tools,
        template=fields.take("chat_template_kwargs", dict, {}),
    )
    return _finished(fields, settings, [request])


def read_completion(fields: Fields, settings: Settings) -> Asked:
    """A body of `/v1/completions`.

    Args:
        fields: of the body.
        settings: of the server.

    Raises:
        RefusedError: a field that is wrong, or that cannot be followed.
        SteerError: a value that is out of its range, or no composition.
    """
    given = fields.take("prompt", (str, list))
    if not given:
        raise RefusedError(400, "prompt: give a text, ids, or a list of these", param="prompt")
    several = isinstance(given, list) and not isinstance(given[0], int)
    prompts = given if several else [given]
    if not all(isinstance(one, str) or (isinstance(one, list) and one) for one in prompts):
        raise RefusedError(400, "prompt: give a text, ids, or a list of these", param="prompt")
    fields.unused("suffix", lambda value: value == "", "nothing is put behind an answer")
    fields.unused("echo", lambda value: value is False, "prompts are not sent back")
    fields.unused("best_of", lambda value: value == 1, "all answers are sent")
    logprobs = fields.take("logprobs", int)
    return _finished(fields, settings, [Request(one, logprobs=logprobs) for one in prompts])


_NO_CHOICE = "tools are given to the chat template, and the model chooses"
_PENALTIES = "tokens are not penalised"


def _finished(fields: Fields, settings: Settings, requests: list[Request]) -> Asked:
    """Take the fields that both kinds of body have, and refuse what is left."""
    steering = fields.steering(settings, asked_model(fields.take("model", str), settings))
    for name in ("frequency_penalty", "presence_penalty"):
        fields.unused(name, lambda value: value == 0, _PENALTIES)
    fields.unused("logit_bias", lambda value: value == {}, "logits are not biased")
    for name in ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"):
        fields.unused(name, lambda _: True, "")
    fields.unused("store", lambda value: value is False, "answers are not stored")
    options = fields.take("stream_options", dict, {})
    longest = fields.take("max_tokens", int)
    stop = fields.take("stop", (str, list), [])
    common: dict[str, Any] = {
        "steering": steering,
        "temperature": fields.take("temperature", (int, float), 1.0),
        "top_p": fields.take("top_p", (int, float), 1.0),
        "top_k": max(fields.take("top_k", int, 0), 0),
        "seed": fields.take("seed", int),
        "n": fields.take("n", int, 1),
        "stop": tuple([stop] if isinstance(stop, str) else stop),
    }
    stream = fields.take("stream", bool, False)
    fields.end()
    return Asked(
        tuple(replace(one, max_tokens=one.max_tokens or longest, **common) for one in requests),
        stream,
        bool(options.get("include_usage")),
    )


class OpenAIForm:
    """Answers in OpenAI's form.

    Args:
        model: what it is called.
        asked: what was asked.
        is_chat: chat completions, else completions.
        vocabulary: from a token's id to its text.
    """

    def __init__(self, model: str, asked: Asked, *, is_chat: bool, vocabulary: Any) -> None:
        self._model, self._asked, self._is_chat, self._text = model, asked, is_chat, vocabulary
        self._id = ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
        """All answers in one object.

        Args:
            answers: of each request.
        """
        choices = []
        for place, answer in enumerate(one for each in answers for one in each):
            assert answer.done is not None
            content = {"message": {"role": "assistant", "content": answer.text}}
            body = content if self._is_chat else {"text": answer.text}
            logprobs = self._logprobs(place, answer.tokens)
            choices.append({"index": place, **body, "logprobs": logprobs, "finish_reason": answer.done.finish})
        dones = [[one.done for one in each if one.done is not None] for each in answers]
        return {**self._head(False), "choices": choices, "usage": _usage(dones)}

    def begin(self) -> list[dict[str, Any]]:
        """What a stream begins with: the role of each answer."""
        if not self._is_chat:
            return []
        count = sum(request.n for request in self._asked.requests)
        return [self._chunk(place, {"role": "assistant", "content": ""}) for place in range(count)]

    def piece(self, place: int, piece: Piece) -> dict[str, Any] | None:
        """More of an answer; None where there is nothing to tell.

        Args:
            place: of its request.
            piece: what came.
        """
        number = place * self._asked.requests[0].n + piece.choice
        if not piece.text and self._asked.requests[place].logprobs is None:
            return None
        return self._chunk(number, {"content": piece.text}, self._logprobs(number, piece.tokens))

    def end(self, place: int, done: Done) -> dict[str, Any]:
        """The end of an answer.

        Args:
            place: of its request.
            done: how it ended.
        """
        return self._chunk(place * self._asked.requests[0].n + done.choice, {}, finish=done.finish)

    def usage(self, dones: Sequence[Sequence[Done]]) -> dict[str, Any]:
        """The last object of a stream that tells its tokens.

        Args:
            dones: the ends of each request's answers.
        """
        return {**self._head(True), "choices": [], "usage": _usage(dones)}

    def _head(self, is_chunk: bool) -> dict[str, Any]:
        kind = "text_completion" if not self._is_chat else "chat.completion.chunk" if is_chunk else "chat.completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(
        self, place: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        body = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        choice = {"index": place, **body, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head(True), "choices": [choice]}

    def _logprobs(self, place: int, tokens: Sequence[Token]) -> Any:
        if not tokens or tokens[0].logprob is None:
            return None
        if self._is_chat:
            return {"content": [{**self._named(t.id, t.logprob), "top_logprobs": self._top(t)} for t in tokens]}
        texts = [self._text(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(place, 0))
            self._offsets[place] = offsets[-1] + len(text)
        top = [{self._text(one): value for one, value in token.top} for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> list[dict[str, Any]]:
        return [self._named(one, value) for one, value in token.top]

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _usage(dones: Sequence[Sequence[Done]]) -> dict[str, Any]:
    """How many tokens there were; the prompt of several answers counts once."""
    prompts = sum(each[0].prompt_tokens for each in dones)
    made = sum(done.tokens for each in dones for done in each)
    cached = sum(max(done.cached_tokens for done in each) for each in dones)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": made,
        "total_tokens": prompts + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
