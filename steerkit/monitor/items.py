"""What a monitor takes: prompts, chats, conversations or JSON objects; and the ways it can read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from steerkit.errors import DataError
from steerkit.prompts.conversation import Conversation, Message

__all__ = ["KINDS", "READS", "Item", "Kind", "Read", "conversation_of"]

Item = str | Sequence[Message] | Conversation | Mapping[str, Any]
Read = Literal["prompt_last", "response_mean"]
Kind = Literal["proj", "cos"]
READS: tuple[Read, ...] = ("prompt_last", "response_mean")
KINDS: tuple[Kind, ...] = ("proj", "cos")


def conversation_of(item: Item, *, raw: bool = False) -> Conversation:
    """Bring a prompt, a chat or a JSON object into one form, a conversation.

    Args:
        item: a prompt, a chat (which may end with its answer), a conversation, or an object with `prompt` (perhaps
            `system` and `response`) or `messages`. Other keys of an object are left alone; an empty response is none.
        raw: leave string prompts as they are, without the chat template.

    Raises:
        DataError: it is none of these.
    """
    if not isinstance(item, Mapping):
        return Conversation.of(item, raw=raw and isinstance(item, str))
    if ("prompt" in item) == ("messages" in item):
        raise DataError(f"give 'prompt' or 'messages'; the object has {', '.join(map(repr, item)) or 'nothing'}")
    if "messages" in item:
        turns = item["messages"]
        empty = isinstance(turns, list) and turns[1:] and turns[-1] == {"role": "assistant", "content": ""}
        return Conversation.of(turns[:-1] if empty else turns)
    prompt = item["prompt"]
    return Conversation.of(
        prompt, answer=item.get("response") or None, system=item.get("system"), raw=raw and isinstance(prompt, str)
    )
