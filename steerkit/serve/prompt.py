"""The prompt of a request as ids: through the chat template where it is a chat."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

from steerkit.errors import DataError
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.serve.request import Request
from steerkit.vector.fitted_rendering import as_fitted
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["PromptReader"]


class PromptReader:
    """Makes ids of prompts, in any thread: it has a tokenizer of its own, since one does not bear several at once.

    Args:
        tokenizer: the model's; it is copied.
        size: entries of the model's table of tokens.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._tokenizer, self._size = copy.deepcopy(tokenizer), size
        self._lock = threading.Lock()

    def ids(self, request: Request, vectors: Sequence[SteeringVector]) -> tuple[int, ...]:
        """The ids of a request's prompt.

        Args:
            request: what is asked. A chat that ends with an assistant turn is continued.
            vectors: that steer it, for how their texts are rendered.

        Raises:
            DataError: there is none, or ids that the model does not have.
            SteerError: the chat template refuses it.
        """
        prompt: Any = request.prompt
        if not isinstance(prompt, str) and not prompt:
            raise DataError("the prompt is empty; give a text, messages, or ids")
        if not isinstance(prompt, str) and isinstance(prompt[0], int):
            wrong = [one for one in prompt if isinstance(one, bool) or not isinstance(one, int)]
            wrong += [one for one in prompt if not wrong and not 0 <= one < self._size]
            if wrong:
                raise DataError(f"prompt: got {repr(wrong[0])[:40]} for a token; give ids from 0 to {self._size - 1}")
            return tuple(prompt)
        options = {**request.template, **({"tools": list(request.tools)} if request.tools else {})}
        with self._lock:
            asked = Conversation.of(prompt, raw=isinstance(prompt, str))
            spoken = as_fitted(vectors, self._tokenizer, options)
            return render(self._tokenizer, asked, chat_template_kwargs=spoken).ids

    def text_of(self, token: int) -> str:
        """What a token stands for, special ones included.

        Args:
            token: its id.
        """
        with self._lock:
            return str(self._tokenizer.decode([token]))
