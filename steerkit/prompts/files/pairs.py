"""Pairs of rows: two answers to one prompt, two prompts, or one prompt under two system prompts.

Besides steerkit's own lines: preferences (`chosen` and `rejected`, as texts, as messages with or without a prompt of
their own, as texts of "Human:" and "Assistant:"), questions with an answer that matches a behaviour and one that does
not, and any two columns that are named.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from steerkit.errors import DataError, near_miss
from steerkit.prompts.conversation import SIDES, Conversation, Prompt, check_text, with_system
from steerkit.prompts.files.columns import CHATS, PROMPTS, SYSTEMS, Columns
from steerkit.prompts.files.prompts import chat_of, flag, plain_prompt, prompt_of
from steerkit.prompts.files.rows import item_at
from steerkit.prompts.messages import is_chat, normalised

__all__ = ["KEYS", "Pair", "answered", "is_ours", "pair_of"]

KEYS = ("prompt", *SIDES, "system", "raw", "held_out", "id", "topic", "source")
_SPOKEN = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class Pair(NamedTuple):
    """One pair.

    Attributes:
        sides: both conversations, the positive one first.
        held_out: what the row says of that; None where it says nothing.
        source: where it comes from; None where the row does not say.
    """

    sides: tuple[Conversation, Conversation]
    held_out: bool | None
    source: str | None


def answered(prompt: Prompt, answer: object, *, raw: bool = False, system: str | None = None) -> Conversation:
    """A conversation that must have an answer.

    Args:
        prompt: the prompt.
        answer: what the assistant says.
        raw: leave a string prompt as it is.
        system: a system prompt.
    """
    check_text("answer", answer)
    return Conversation.of(prompt, answer=str(answer), raw=raw, system=system)


def is_ours(row: object, columns: Columns) -> bool:
    """Whether a row is a line of steerkit's own format, in which another key is a mistake.

    Args:
        row: of a file that is no table.
        columns: names of columns that are not the usual ones.
    """
    if not isinstance(row, Mapping) or columns.named:
        return False
    return any(side in row for side in SIDES) or ("prompt" in row and isinstance(row.get("system"), Mapping))


def pair_of(row: object, columns: Columns, *, is_table: bool) -> Pair:
    """The pair of one row.

    Args:
        row: an object.
        columns: names of columns that are not the usual ones.
        is_table: an empty cell is a missing one, and columns that are of no use are left alone.

    Raises:
        DataError: it is no object, a side is missing, a key is unknown, or a value is of the wrong type.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"expected a JSON object, got {reprlib.repr(row)}; write one object a line")
    ours = not is_table and is_ours(row, columns)
    for key in row if ours else ():
        if key not in KEYS:
            raise DataError(f"unknown key {key!r}; {near_miss(str(key), KEYS)}")
    raw = flag(row, "raw", is_table=is_table)
    held_out = flag(row, "held_out", is_table=is_table) if "held_out" in row else None
    if ours:
        sides = _own(row, raw=raw)
    else:
        first, second = _sides(row, columns, is_table=is_table)
        sides = (Conversation.of(first, raw=raw), Conversation.of(second, raw=raw))
    source = columns.find(row, "source", ("source",))
    named = None if source is None or not isinstance(row[source], str) else row[source]
    return Pair(sides, held_out, named or None if is_table else named)


def _own(row: Mapping[str, Any], *, raw: bool) -> tuple[Conversation, Conversation]:
    """Both conversations of a line of steerkit's own format."""
    given = [side for side in SIDES if side in row]
    systems = row.get("system")
    if "system" in row:
        if not isinstance(systems, dict) or set(systems) != set(SIDES):
            raise DataError(f"system: expected an object of positive and negative, got {reprlib.repr(systems)}")
        if "prompt" not in row:
            raise DataError("no 'prompt'; two system prompts need the prompt that both stand before")
    if len(given) < 2 and not (systems and not given):
        raise _one_sided(row)
    first, second = (_own_side(row, side, raw=raw) for side in SIDES)
    return first, second


def _own_side(row: Mapping[str, Any], side: str, *, raw: bool) -> Conversation:
    with item_at(side):
        conversation = Conversation.of(cast(Prompt, row["prompt"] if "prompt" in row else row[side]), raw=raw)
        if "system" in row:
            check_text("system", row["system"][side])
            conversation = with_system(conversation, row["system"][side])
        return answered(conversation, row[side]) if "prompt" in row and side in row else conversation


def _one_sided(row: Mapping[str, Any]) -> DataError:
    missing = next(side for side in SIDES if side not in row)
    return DataError(
        f"no {missing!r}; a line has both sides: two answers to its prompt, or two prompts; this one has "
        f"{Columns.told(row)}"
    )


def _sides(row: Mapping[str, Any], columns: Columns, *, is_table: bool) -> tuple[Conversation, Conversation]:
    """Both conversations of a row of another format."""
    found = columns.sides(row)
    if found is None and is_table:
        raise DataError(
            f"no columns of two sides; there are {columns.told(row)}; name them with "
            "--columns positive=NAME,negative=NAME"
        )
    if found is None:
        raise _one_sided(row)
    for name in found:
        if is_table and row[name] in (None, ""):
            raise DataError(f"the cell of {name!r} is empty; give both sides, or leave the row out")
    values = [_turns(chat_of(row[name]) if is_table else row[name]) for name in found]
    rest = {key: value for key, value in row.items() if key not in found}
    first, second = (
        _conversation(value, name, rest, columns, is_table=is_table) for name, value in zip(found, values, strict=True)
    )
    return first, second


def _turns(value: Any) -> Any:
    """What one side says: a text, or messages where it is some, in whatever way they are written."""
    if isinstance(value, Mapping) and is_chat([value]):
        value = [value]
    if isinstance(value, str) and value.lstrip().startswith("Human:"):
        _, *parts = _SPOKEN.split(value.strip())
        spoken = zip(parts[::2], parts[1::2], strict=True)
        turns = [{"role": _SPEAKERS[who], "content": said.strip()} for who, said in spoken]
        return turns if turns[-1]["role"] == "assistant" else value
    return value


def _conversation(value: Any, name: str, rest: Mapping[str, Any], columns: Columns, *, is_table: bool) -> Conversation:
    """One side: a whole conversation, an answer to the row's prompt, or a prompt itself."""
    with item_at(name):
        turns = normalised(value) if is_chat(value) else ()
        if turns and turns[0]["role"] != "assistant":
            return Conversation.of(turns)  # the prompt stands in front of it, whether or not it stands alone too
        if columns.find(rest, "prompt", (*PROMPTS, *CHATS)) is None:
            if turns:
                raise DataError(f"an answer without a prompt; the row has {columns.told(rest)} besides")
            system = columns.find(rest, "system", SYSTEMS)
            return Conversation.of(value, system=None if system is None else rest[system] or None)
        if columns.find(rest, "prompt", PROMPTS) is not None:  # beside the chat that it begins
            rest = {key: entry for key, entry in rest.items() if key not in CHATS}
        prompt = prompt_of(rest, columns, is_table=is_table)
        if not turns:
            return answered(prompt, value)
        before = plain_prompt(prompt)
        asked = [{"role": "user", "content": before}] if isinstance(before, str) else before
        return Conversation.of([*asked, *turns])
