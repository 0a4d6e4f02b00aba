"""Asking a model behind an OpenAI-compatible endpoint (vLLM, llama.cpp, TGI, the large providers): HTTP and its errors.

The key is sent to the address given alone (redirects are not followed) and shown nowhere. What is asked again is what
may help: time-outs, broken connections, HTTP 408, 429 and 5xx. A request that is refused for a field which some models
do not know (`max_tokens`, `temperature`, `seed`) is sent once more without it, and so are all further ones.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from steerkit.errors import SteerError

__all__ = ["FILTERED", "KEYS", "Endpoint", "told"]

KEYS = ("STEERKIT_JUDGE_KEY", "OPENAI_API_KEY")
FILTERED = "content_filter"
"""Code and reason with which providers refuse one prompt for what it says: a failure of that item alone."""
LARGEST_REPLY = 2**24  # bytes
# Fields that some models refuse, and what they are called there; None leaves them out.
_OPTIONAL = {"max_tokens": "max_completion_tokens", "temperature": None, "seed": None}


class Endpoint:
    """Chat completions of one model.

    Args:
        base_url: such as ``http://localhost:8000/v1``.
        model: the endpoint's name of the model.
        api_key: None takes the environment variable STEERKIT_JUDGE_KEY, else OPENAI_API_KEY; "" sends none.
        role: what it is asked for, to begin errors with.
        timeout: seconds without a sign of the endpoint.
        retries: further tries where that may help.
        backoff: seconds before the first of them; each further one waits twice as long.

    Raises:
        SteerError: `base_url` is no plain address, the model has no name, or the key holds blanks or the like.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        role: str = "judge",
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
    ) -> None:
        self.base_url = _checked_url(base_url, role)
        if not model:
            raise SteerError(f"{role} at {self.base_url}: no model is named; write {self.base_url}#model-name")
        self.model, self.role = model, role
        self._key = _checked_key(api_key, role)
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._refused: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r}, {self.model!r})"

    def check(self, status: int, body: bytes) -> None:
        """Refuse a reply that is an error.

        Args:
            status: of HTTP.
            body: of the reply.

        Raises:
            SteerError: it is one.
        """
        if status in (401, 403):  # nothing of the reply: providers quote the key in it
            raise self.error(f"HTTP {status}, the key is missing or refused; set {KEYS[0]}")
        if status != 200:
            raise self.error(f"HTTP {status}{self.shown(told(body)[0])}")

    def no_completion(self, body: bytes) -> SteerError:
        """The error for a reply that is no chat completion.

        Args:
            body: of the reply.
        """
        return self.error(f"the reply is no chat completion{self.shown(told(body)[0])}; check the url")

    def post(self, asked: Mapping[str, Any], stop: threading.Event | None = None) -> tuple[int, bytes]:
        """Send a request, again where that may help.

        Args:
            asked: the request's fields.
            stop: once it is set, nothing is sent any more.

        Returns:
            Status and body of the reply.

        Raises:
            SteerError: there was none, or the last one too says to come back later.
        """
        refused = self._refused
        while True:
            status, body = self._sent(_without(asked, refused), stop or threading.Event())
            said, code = told(body) if status in (400, 422) and len(refused) < len(_OPTIONAL) else ("", FILTERED)
            named = [name for name in _OPTIONAL if name in asked and re.search(rf"\b{name}\b", said)]
            # Some name one field and mean another: where it is gone already, the next one goes.
            left = [name for name in (*named, *_OPTIONAL) if name in asked and name not in refused]
            more = left[0] if named and left else None
            if more is None or code == FILTERED:
                break
            refused = (*refused, more)
        if status == 200:  # only now: it was the field
            self._refused = refused
        return status, body

    def _sent(self, asked: Mapping[str, Any], stop: threading.Event) -> tuple[int, bytes]:
        """Send one request as it is, again where that may help."""
        headers = {"Content-Type": "application/json", "User-Agent": "steerkit"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(
            f"{self.base_url}/chat/completions", json.dumps(asked).encode(), headers, method="POST"
        )
        happened, pause = "", 0.0
        for attempt in range(self.retries + 1):
            if stop.wait(max(pause, self.backoff * 2 ** (attempt - 1)) if attempt else 0):
                raise self.error("stopped")
            try:
                with _OPENER.open(request, timeout=self.timeout) as response:
                    return response.status, response.read(LARGEST_REPLY)
            except urllib.error.HTTPError as error:
                with error:
                    body = _body(error)
                if error.code not in (408, 429) and error.code < 500:
                    return error.code, body
                happened, pause = f"HTTP {error.code}{self.shown(told(body)[0])}", _asked_pause(error.headers)
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                happened, pause = _what_broke(error, self.timeout), 0.0
        raise self.error(f"{happened}, {self.retries + 1} tries")

    def shown(self, said: str) -> str:
        """What an endpoint says about an error, short, on one line, without the key.

        Args:
            said: its words.
        """
        text = said.replace(self._key, "...") if self._key else said
        text = " ".join("".join(mark if mark.isprintable() else " " for mark in text).split())
        return f" ({text[:200]})" if text else ""

    def error(self, happened: str) -> SteerError:
        """An error that names the model and where it is.

        Args:
            happened: what went wrong.
        """
        return SteerError(f"{self.role} {self.model} at {self.base_url}: {happened}")


def _without(asked: Mapping[str, Any], refused: Sequence[str]) -> dict[str, Any]:
    """A request's fields without those that the endpoint refuses."""
    names = {name: _OPTIONAL[name] if name in refused else name for name in asked}
    return {new: asked[name] for name, new in names.items() if new is not None}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves redirects as errors: urllib would hand the key to wherever they lead."""

    def redirect_request(self, *_: Any) -> None:
        return None


# The standard library's client: the one of huggingface_hub falls back on the user's hub token for any address, and
# does not work with HF_HUB_OFFLINE set, which a local endpoint is no reason to unset.
_OPENER = urllib.request.build_opener(_NoRedirects)


def _checked_url(base_url: str, role: str) -> str:
    """A plain address without a slash at its end.

    Raises:
        SteerError: it is none. A part that may be secret is not shown.
    """
    hint = "give it as https://host/v1"
    try:
        parts = urlsplit(base_url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if not whole or not base_url.isprintable() or not base_url.isascii() or " " in base_url:
        raise SteerError(f"{role}: the url is no address of an endpoint; {hint}")
    if parts.username is not None or parts.query or parts.fragment:
        raise SteerError(f"{role} at {parts.hostname}: the url holds more than host and path; {hint} and the key apart")
    return base_url.rstrip("/#?").removesuffix("/chat/completions")


def _checked_key(api_key: str | None, role: str) -> str:
    """The key, which may be empty.

    Raises:
        SteerError: it cannot stand in a header; the client's own error would show it.
    """
    if api_key is None:
        api_key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "")
    key = api_key.strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise SteerError(f"{role}: the key holds blanks or characters other than ASCII; check how it was copied")
    return key


def _body(response: Any) -> bytes:
    """What an error's reply says, where it arrives at all."""
    try:
        body: bytes = response.read(LARGEST_REPLY)
    except (OSError, http.client.HTTPException):
        return b""
    return body


def told(body: bytes) -> tuple[str, str]:
    """Message and code of an error's reply, in the shapes that endpoints use; empty where there are none.

    Args:
        body: of the reply.
    """
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        return "", ""
    error = reply.get("error", reply) if isinstance(reply, dict) else None
    if isinstance(error, str):
        return error, ""
    if not isinstance(error, dict):
        return "", ""
    said = error.get("message") or error.get("detail") or ""
    return str(said), str(error.get("code") or "")


def _asked_pause(headers: Any) -> float:
    """Seconds that the endpoint asks to wait, at most a minute; dates are not read."""
    asked = str(headers.get("Retry-After", "")).strip()
    return min(float(asked), 60.0) if re.fullmatch(r"[0-9]{1,6}", asked) else 0.0


def _what_broke(error: BaseException, timeout: float) -> str:
    """A failed connection in a few words."""
    inner = getattr(error, "reason", None)
    cause = inner if isinstance(inner, BaseException) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {timeout:g} s"
    said = " ".join(str(cause).split())[:200]
    return f"no connection ({type(cause).__name__}{': ' if said else ''}{said})"
