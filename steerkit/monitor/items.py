"""What a monitor takes: prompts, chats, conversations or JSON objects; and the ways it can read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from steerkit.prompts.conversation import Conversation, Message
from steerkit.prompts.files.columns import CHATS, RESPONSES, Columns
from steerkit.prompts.files.prompts import chat_of, prompt_of
from steerkit.prompts.messages import is_chat
from steerkit.steering.readings import READS, Read

__all__ = ["KINDS", "READS", "Item", "Kind", "Read", "conversation_of"]

Item = str | Sequence[Message] | Conversation | Mapping[str, Any]
Kind = Literal["proj", "cos"]
KINDS: tuple[Kind, ...] = ("proj", "cos")


def conversation_of(
    item: Item, columns: Columns | None = None, *, raw: bool = False, is_table: bool = False
) -> Conversation:
    """Bring a prompt, a chat or a JSON object into one form, a conversation.

    Args:
        item: a prompt, a chat (which may end with its answer), a conversation, or an object with `prompt` (perhaps
            `system` and `response`), `messages`, or other usual names of these. Other keys of an object are left alone;
            an empty response is none.
        columns: names that are not the usual ones.
        raw: leave string prompts as they are, without the chat template.
        is_table: the object is a row of a table, in which an empty cell is a missing one and chats may be text.

    Raises:
        DataError: it is none of these.
    """
    if not isinstance(item, Mapping):
        return Conversation.of(item, raw=raw and isinstance(item, str))
    columns = columns or Columns()
    chat = columns.find(item, "prompt", CHATS)
    turns: Any = () if chat is None else chat_of(item[chat]) if is_table else item[chat]
    if is_chat(turns) and turns[1:] and turns[-1] == {"role": "assistant", "content": ""}:
        item = {**item, str(chat): turns[:-1]}
    prompt = prompt_of(item, columns, is_table=is_table)
    # Beside steerkit's own names other keys are left alone.
    name = columns.find(item, "response", RESPONSES[:1] if {"prompt", "messages"} & item.keys() else RESPONSES)
    response = None if name is None else item[name] or None
    prompt = Conversation.of(prompt, answer=response) if prompt.answer is None else prompt
    return Conversation.of(prompt, raw=raw and isinstance(prompt.prompt, str))
