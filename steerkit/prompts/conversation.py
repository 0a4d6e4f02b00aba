"""`Conversation`: what one text is made of before a tokenizer sees it: prompt, answer, system prompt."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from steerkit.errors import DataError
from steerkit.prompts.messages import Message, check_text, normalised

__all__ = ["SIDES", "Conversation", "Message", "Prompt", "check_text", "with_system"]

SIDES = ("positive", "negative")


@dataclass(frozen=True)
class Conversation:
    """What the model is given: a prompt, and where there is one the answer that follows it.

    Attributes:
        prompt: messages, each with ``role`` and ``content`` (further keys reach the template, see
            `steerkit.prompts.messages`), or a string: one user turn where the tokenizer has a chat template, plain text
            otherwise.
        answer: what the assistant says, verbatim. None leaves the conversation at the prompt's end.
        system: the system prompt before a string prompt. In a message list it is a message.
        raw: leave the string prompt as it is, without a chat template.

    Raises:
        DataError: when a field has another type, a message lacks its role or content, the answer is empty, a message
            list is empty, `system` stands beside a message list or a raw prompt, or text holds a lone surrogate.
    """

    prompt: str | tuple[Message, ...]
    answer: str | None = None
    system: str | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            check_text("prompt", self.prompt)
        else:
            object.__setattr__(self, "prompt", normalised(self.prompt))
        for name in ("answer", "system"):
            value = getattr(self, name)
            if value is not None:
                check_text(name, value)
        if self.answer == "":
            raise DataError("the answer is an empty string, which has no token to read; give its text, or None")
        if not isinstance(self.raw, bool):
            raise DataError(f"raw is true or false, got {reprlib.repr(self.raw)}")
        if self.raw and not isinstance(self.prompt, str):
            raise DataError("raw leaves a string as it is, got a list of messages; give a string, or drop raw")
        if self.system is not None and (self.raw or not isinstance(self.prompt, str)):
            kind = "a raw prompt" if self.raw else "a list of messages"
            raise DataError(f"a system prompt cannot stand beside {kind}; write it into the prompt")

    @classmethod
    def of(
        cls,
        item: str | Sequence[Message] | Conversation,
        *,
        answer: str | None = None,
        system: str | None = None,
        raw: bool = False,
    ) -> Conversation:
        """Make a conversation of a string, a list of messages, or a conversation.

        Args:
            item: the prompt. A message list that ends with an assistant turn: that turn is the answer.
            answer: what the assistant says, verbatim.
            system: a system prompt; before a message list it becomes the first message.
            raw: leave a string prompt as it is, without a chat template.

        Returns:
            The conversation; `item` and its messages are copied.

        Raises:
            DataError: when `item` is of another type, holds an answer or a system prompt and is given a second one, or
                cannot be a conversation (see the class).

        Example:
            >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
            >>> Conversation.of(turns).answer
            'Hello.'
        """
        if isinstance(item, Conversation):
            made = item
        elif isinstance(item, str):
            made = cls(item)
        else:
            turns = normalised(item)
            made = cls(turns[:-1], answer=_only_content(turns[-1])) if turns[-1]["role"] == "assistant" else cls(turns)
        if raw:
            made = replace(made, raw=True)
        if answer is not None:
            if made.answer is not None:
                raise DataError(f"the prompt ends with an answer already, and {reprlib.repr(answer)} is given as well")
            made = replace(made, answer=answer)
        return made if system is None else with_system(made, system)


Prompt: TypeAlias = str | Sequence[Message] | Conversation


def _only_content(turn: Message) -> str:
    """The text of a closing assistant turn, which as an answer can keep nothing else."""
    extra = sorted(turn.keys() - {"role", "content"})
    if extra:
        raise DataError(f"the closing assistant turn has {extra[0]!r} beside role and content; an answer is text only")
    return str(turn["content"])


def with_system(conversation: Conversation, system: str) -> Conversation:
    """Put a system prompt before a conversation that has none.

    Args:
        conversation: the conversation.
        system: the system prompt.

    Raises:
        DataError: it has one already.
    """
    prompt = conversation.prompt
    if conversation.system is not None or (not isinstance(prompt, str) and prompt[0]["role"] == "system"):
        raise DataError(f"the prompt has a system prompt already, and {reprlib.repr(system)} is given as well")
    if isinstance(prompt, str):
        return replace(conversation, system=system)
    return replace(conversation, prompt=({"role": "system", "content": system}, *prompt))
