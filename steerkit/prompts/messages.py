"""Lists of messages as people export them, brought to one form: a role, a text, and what a template reads besides.

OpenAI's chats and ShareGPT's turns (``from`` and ``value``) become the same messages. Text parts are joined to one
text, the role `developer` is `system`, a call of tools without words has an empty text, and its arguments are an
object, which is what chat templates take. Keys that are empty, and those by which servers keep their books, are
dropped; everything else goes to the template as it is.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from steerkit.errors import DataError

__all__ = ["Message", "check_text", "is_chat", "normalised"]

Message: TypeAlias = Mapping[str, Any]

# What a server or an export notes about a message and no template writes.
_BOOKS = (
    "annotations",
    "audio",
    "created",
    "created_at",
    "finish_reason",
    "id",
    "index",
    "logprobs",
    "model",
    "refusal",
    "stop_reason",
    "timestamp",
    "token_ids",
    "weight",
)
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_TEXT_PARTS = ("text", "input_text", "output_text")


def check_text(name: str, value: object) -> None:
    """Refuse what is not text that a tokenizer can read.

    Args:
        name: what to call it in messages.
        value: anything.

    Raises:
        DataError: it is no string, or holds a lone surrogate.
    """
    if not isinstance(value, str):
        raise DataError(f"{name}: expected a string, got {reprlib.repr(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(value[error.start]):04X}"
        raise DataError(f"{name}: character {error.start} is a lone surrogate ({code}), which is not text") from None


def is_chat(value: object) -> bool:
    """Whether a value is one chat, a list of messages or turns, and not a list of many things.

    Args:
        value: anything.
    """
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_turn, value))


def _is_turn(value: object) -> bool:
    return isinstance(value, Mapping) and (
        ("role" in value and ("content" in value or "tool_calls" in value)) or ("from" in value and "value" in value)
    )


def normalised(items: object) -> tuple[Message, ...]:
    """Copy a list of messages in the one form.

    Args:
        items: messages with `role` and `content`, or turns with `from` and `value`.

    Returns:
        Messages whose role and content are strings.

    Raises:
        DataError: it is no such list, a message lacks its role or content, or its content is not text.
    """
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
        raise DataError(f"prompt: expected a string or a list of messages, got {reprlib.repr(items)}")
    if not items:
        raise DataError("prompt: an empty list of messages; give at least one turn before the answer")
    return tuple(_message(item, f"message {index}") for index, item in enumerate(items))


def _message(item: object, place: str) -> Message:
    """One message, copied."""
    if not isinstance(item, Mapping):
        raise DataError(f"{place}: expected an object with role and content, got {reprlib.repr(item)}")
    if "role" not in item and "from" in item:
        item = _of_turn(item, place)
    message = {
        key: _plain(value, f"{place}, {key!r}")
        for key, value in item.items()
        if key in ("role", "content") or (key not in _BOOKS and value not in (None, "", [], (), {}))
    }
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message["tool_calls"] = list(map(_call, calls))
    if calls and not message.get("content"):
        message["content"] = ""
    for key in ("role", "content"):
        if message.get(key) is None:
            raise DataError(f"{place}: no {key!r}; it has {', '.join(map(repr, _named(message))) or 'nothing'}")
    message["content"] = _joined(message["content"], f"{place}, 'content'")
    check_text(f"{place}, 'role'", message["role"])
    message["role"] = "system" if message["role"] == "developer" else message["role"]
    return message


def _named(message: Message) -> list[str]:
    return [key for key, value in message.items() if value is not None]


def _of_turn(item: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A message of a ShareGPT turn."""
    speaker = item["from"]
    role = _SPEAKERS.get(str(speaker).casefold())
    if role is None:
        raise DataError(f"{place}: from {reprlib.repr(speaker)}; there are: {', '.join(_SPEAKERS)}")
    message = {key: value for key, value in item.items() if key not in ("from", "value")}
    message |= {"role": role, "content": item.get("value")}
    if speaker == "function_call":
        message |= {"content": "", "tool_calls": [{"type": "function", "function": _object(item.get("value"))}]}
        if not isinstance(message["tool_calls"][0]["function"], dict):
            raise DataError(f"{place}: a function_call is a JSON object, got {reprlib.repr(item.get('value'))}")
    return message


def _object(value: object) -> object:
    """The JSON object that a text is; whatever else it is, as it was."""
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, dict) else value
    return value


def _call(call: object) -> object:
    """A call of a tool with its arguments as an object."""
    if not isinstance(call, dict):
        return call
    function = call.get("function")
    if isinstance(function, dict) and "arguments" in function:
        return {**call, "function": {**function, "arguments": _object(function["arguments"])}}
    return call


def _joined(content: object, place: str) -> str:
    """Content as one text: a string, or text parts below each other."""
    if not isinstance(content, list):
        check_text(place, content)
        return str(content)
    texts = []
    for part in content:
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS:
            what = reprlib.repr(part) if kind is None else f"a part of the type {kind!r}"
            raise DataError(f"{place}: expected a string or text parts, got {what}; only text can be steered here")
        check_text(place, part.get("text"))
        texts.append(part["text"])
    return "\n".join(texts)


def _plain(value: object, place: str) -> Any:
    """A copy of plain data; text in it is checked."""
    if isinstance(value, str):
        check_text(place, value)
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, place) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, place) for entry in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise DataError(f"{place}: expected text, numbers, lists or objects, got {reprlib.repr(value)}")
