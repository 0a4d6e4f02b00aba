"""Who writes a draft: a model behind an endpoint, or one in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import nn

from steerkit._support.endpoint import Endpoint
from steerkit.generation import generate
from steerkit.prompts.conversation import Conversation

__all__ = ["Writer", "endpoint_writer", "model_writer"]

LONGEST_REPLY = 2000  # tokens
Writer = Callable[[str, int], str]
"""From a prompt and the number of the try to a reply; another try should give another reply."""


def endpoint_writer(spec: str, api_key: str | None = None) -> Writer:
    """A writer behind an OpenAI-compatible endpoint.

    Args:
        spec: ``https://host/v1#model-name``.
        api_key: as for `steerkit._support.endpoint.Endpoint`.

    Raises:
        SteerError: the address is none, or no model is named.
    """
    base_url, _, model = spec.partition("#")
    endpoint = Endpoint(base_url, model, api_key, role="writer", timeout=300.0)

    def write(prompt: str, number: int) -> str:
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": LONGEST_REPLY,
            "temperature": 0.7,
            "seed": number,
        }
        status, body = endpoint.post(asked)
        endpoint.check(status, body)
        try:
            text = json.loads(body)["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise endpoint.no_completion(body) from None
        if not isinstance(text, str):
            raise endpoint.no_completion(body)
        return text

    return write


def model_writer(model: nn.Module, tokenizer: Any, *, max_new_tokens: int = 1000) -> Writer:
    """A local model as writer.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        max_new_tokens: the longest reply, in tokens.
    """

    def write(prompt: str, number: int) -> str:
        asked = [Conversation(prompt)]
        (text,) = generate(
            model, tokenizer, asked, max_new_tokens=max_new_tokens, do_sample=True, temperature=0.7, seed=[number]
        )
        return text

    return write
