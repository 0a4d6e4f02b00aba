"""Reading contrast pairs and labelled prompts from JSONL files; every mistake is told with its line."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from steerkit.errors import DataError, near_miss
from steerkit.prompts.conversation import SIDES, Conversation, Prompt, check_text, with_system

__all__ = ["answered_pair", "item_at", "item_pair", "labelled_items", "lines_of_file", "other_label"]


@contextmanager
def item_at(place: str) -> Iterator[None]:
    """Put a place before the message of a DataError.

    Args:
        place: such as ``line 3``.

    Raises:
        DataError: the one raised inside, with the place before it.
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def answered_pair(prompt: Prompt, answer: object, *, raw: bool = False, system: str | None = None) -> Conversation:
    """A conversation that must have an answer.

    Args:
        prompt: the prompt.
        answer: what the assistant says.
        raw: leave a string prompt as it is.
        system: a system prompt.
    """
    check_text("answer", answer)
    return Conversation.of(prompt, answer=str(answer), raw=raw, system=system)


def lines_of_file(
    path: Path, keys: Sequence[str], what: str, read: Callable[[dict[str, object], list[dict[str, object]]], None]
) -> list[dict[str, object]]:
    """The objects of a JSONL file, each handed to `read`, whose mistakes are told with the line.

    Args:
        path: the file.
        keys: what an object may have.
        what: what the file should hold, for messages.
        read: called with each object and those before it.

    Raises:
        DataError: the file cannot be read or holds nothing, or a line is no such object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the file ({error.strerror}); give a JSONL file of {what}") from None
    items: list[dict[str, object]] = []
    # Only "\n" ends a line: JSON strings may hold the other separators that str.splitlines splits at.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            with item_at(f"{path}, line {number}"):
                item = _parse(line, keys)
                read(item, items)
                items.append(item)
    if not items:
        raise DataError(f"{path}: the file holds no item; write one JSON object a line")
    return items


def labelled_items(item: dict[str, object], others: Sequence[dict[str, object]]) -> Conversation:
    """The prompt of one labelled line; either all lines before it have a source as well, or none.

    Args:
        item: the line's object.
        others: those before it.

    Raises:
        DataError: a key is missing, is no text, or only some lines have a source.
    """
    for key in ("prompt", "label"):
        if key not in item:
            raise DataError(f"no {key!r}; a line has a prompt and the label of its side")
    for key in ("label", "source"):
        if key in item:
            check_text(key, item[key])
    if others and ("source" in item) is not ("source" in others[0]):
        raise DataError("some lines have a source and others have none; give one to all, or to none")
    return Conversation.of(cast(Prompt, item["prompt"]), raw=bool(item.get("raw", False)))


def other_label(labels: Sequence[str], positive: str) -> str:
    """The one label beside the positive side's.

    Args:
        labels: of all lines.
        positive: the positive side's.

    Raises:
        DataError: there is no other, or more than one.
    """
    others = sorted(set(labels) - {positive})
    if len(others) > 1:
        raise DataError(f"beside {positive!r} there are the labels {', '.join(others)}; name the negative one")
    if not others:
        raise DataError(f"every line has the label {positive!r}; a contrast needs both sides")
    return others[0]


def _parse(line: bytes, keys: Sequence[str]) -> dict[str, object]:
    """One line of a JSONL file, with known keys only."""
    try:
        item = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"malformed JSON at column {error.colno}: {error.msg}; write one JSON object a line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"JSON that Python cannot read ({error}); write one JSON object a line") from None
    if not isinstance(item, dict):
        raise DataError(f"expected a JSON object, got {reprlib.repr(item)}; write one object a line")
    for key in item:
        if key not in keys:
            raise DataError(f"unknown key {key!r}; {near_miss(key, keys)}")
    for key in ("raw", "held_out"):
        if not isinstance(item.get(key, False), bool):
            raise DataError(f"{key} is true or false, got {reprlib.repr(item[key])}")
    return item


def item_pair(item: dict[str, object]) -> list[Conversation]:
    """Both conversations of one line, the positive one first.

    Args:
        item: the line's object.

    Raises:
        DataError: a side is missing, or a value is of the wrong type.
    """
    answered = [side for side in SIDES if side in item]
    systems = item.get("system")
    if "system" in item:
        if not isinstance(systems, dict) or set(systems) != set(SIDES):
            raise DataError(f"system: expected an object of positive and negative, got {reprlib.repr(systems)}")
        if "prompt" not in item:
            raise DataError("no 'prompt'; two system prompts need the prompt that both stand before")
    if len(answered) < 2 and not (systems and not answered):
        missing = next(side for side in SIDES if side not in item)
        raise DataError(f"no {missing!r}; a line has both sides: two answers to its prompt, or two prompts")
    pair = []
    for side in SIDES:
        with item_at(side):
            prompt = cast(Prompt, item["prompt"] if "prompt" in item else item[side])
            conversation = Conversation.of(prompt, raw=bool(item.get("raw", False)))
            if isinstance(systems, dict):
                check_text("system", systems[side])
                conversation = with_system(conversation, systems[side])
            if "prompt" in item and side in item:
                conversation = answered_pair(conversation, item[side])
            pair.append(conversation)
    return pair
