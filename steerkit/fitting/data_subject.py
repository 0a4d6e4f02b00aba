"""What a method's `fit` may ask about its data, which needs a tokenizer and no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from steerkit.errors import DataError
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.prompt_set import PromptSet
from steerkit.prompts.rendering import Rendered, render

__all__ = ["DataSubject"]


class DataSubject:
    """The data that a method is fitted on, as its model reads it.

    Args:
        tokenizer: of the model.
        data: what the method is fitted on: a contrast set, or prompts without sides.
        chat_template_kwargs: passed on to the chat template.
        name: what errors call the method.
    """

    def __init__(
        self, tokenizer: Any, data: ContrastSet | PromptSet, chat_template_kwargs: Mapping[str, Any] | None, name: str
    ) -> None:
        self._tokenizer, self._data, self._chat, self._name = tokenizer, data, chat_template_kwargs, name

    @property
    def data(self) -> ContrastSet:
        """What the method is fitted on.

        Raises:
            DataError: that has no sides.
        """
        if isinstance(self._data, PromptSet):
            raise DataError(f"{self._name} is fitted on prompts, which have no sides; read `subject.prompts`")
        return self._data

    @property
    def prompts(self) -> tuple[Conversation, ...]:
        """The prompts of what it is fitted on, each once, without answers."""
        return PromptSet.of(self._data).prompts

    def rendered(self, items: Sequence[Any]) -> list[Rendered]:
        """Items as the model reads them.

        Args:
            items: prompts, conversations or rendered texts.
        """
        return [
            item
            if isinstance(item, Rendered)
            else render(self._tokenizer, Conversation.of(item), chat_template_kwargs=self._chat)
            for item in items
        ]

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without special tokens.

        Args:
            text: such as the beginning of an answer.
        """
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def pair_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of the one pair of prompts the method is fitted on.

        Raises:
            DataError: the data is not exactly one pair of prompts.
        """
        data = self.data
        if len(data.positive) != 1 or len(data.negative) != 1:
            raise DataError(
                f"{self._name} takes one pair of prompts, got {len(data.positive)} positive and "
                f"{len(data.negative)} negative ones; give one of each"
            )
        sides = (data.positive[0], data.negative[0])
        # A bare string is meant as it stands: with a chat template around it, most of the window would be template.
        plain = [isinstance(side.prompt, str) and side.system is None and side.answer is None for side in sides]
        raw = [replace(side, raw=side.raw or is_plain) for side, is_plain in zip(sides, plain, strict=True)]
        plus, minus = self.rendered(raw)
        return plus.ids, minus.ids

    def filler_id(self, text: str) -> int:
        """Id of the one token that `text` is.

        Args:
            text: such as a space.

        Raises:
            DataError: the tokenizer makes none or several tokens of it.
        """
        ids = self.token_ids(text)
        if len(ids) != 1:
            raise DataError(
                f"filler {text!r} is {len(ids)} tokens for this tokenizer; choose one that is a single token"
            )
        return ids[0]
