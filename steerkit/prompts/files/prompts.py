"""Prompts of rows: a text, a chat, or an object whose prompt has a usual name or one that was given."""

from __future__ import annotations

import ast
import json
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerkit.errors import DataError
from steerkit.prompts.conversation import Conversation, check_text, with_system
from steerkit.prompts.files.columns import CHATS, PROMPTS, SYSTEMS, Columns
from steerkit.prompts.files.reading import read_rows
from steerkit.prompts.files.telling import tell, tell_of_tools
from steerkit.prompts.messages import is_chat

__all__ = ["as_raw", "chat_of", "flag", "placed_prompts", "plain_prompt", "prompt_of", "read_prompts", "unescaped"]

_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}


def read_prompts(
    source: str | Path, columns: Columns | None = None, *, raw: bool = False, escapes: bool = False
) -> list[Conversation]:
    r"""Read prompts of any file: a text, a chat or an object a row, see `steerkit.prompts.files.reading.read_rows`.

    Args:
        source: a file, - for stdin, or ``hf:`` and the name of a data set.
        columns: names of columns that are not the usual ones.
        raw: leave prompts that are text as they are, without the chat template.
        escapes: read a written ``\n`` (or ``\t``, ``\r``, ``\\``) in texts as the character it stands for.

    Returns:
        The prompts in the order of the file.

    Raises:
        DataError: the file cannot be read or holds no prompt, or, with its place, a row is none.

    Warns:
        UserWarning: prompts hold the marks of a chat template, or written line breaks, and `raw` or `escapes` is what
            they are in want of.
    """
    found = placed_prompts(source, columns or Columns())
    tell(found, raw=raw, escapes=escapes)
    return [as_raw(one, raw=raw and isinstance(one.prompt, str), escapes=escapes) for _, one in found]


def placed_prompts(source: str | Path, columns: Columns) -> list[tuple[str, Conversation]]:
    """Read prompts of any file as they stand there, each with its place.

    Args:
        source: a file, - for stdin, or ``hf:`` and the name of a data set.
        columns: names of columns that are not the usual ones.

    Raises:
        DataError: the file cannot be read or holds no prompt, or, with its place, a row is none.
    """
    rows = read_rows(source, columns)
    found = rows.each(lambda value: _chat_with_system(prompt_of(value, columns, is_table=rows.is_table)))
    if not found:
        raise DataError(f"{rows.name}: the file holds no prompt; write one a line")
    tell_of_tools(rows.name, rows.rows)
    return list(zip(rows.places, found, strict=True))


def _chat_with_system(one: Conversation) -> Conversation:
    return one if one.system is None else Conversation.of(plain_prompt(one))


def prompt_of(value: object, columns: Columns | None = None, *, is_table: bool = False) -> Conversation:
    """The prompt of one row.

    Args:
        value: a text, a chat, or an object.
        columns: names of columns that are not the usual ones.
        is_table: an empty cell is a missing one.

    Returns:
        The prompt with its system prompt; a chat that ends with the assistant's turn has that as its answer.

    Raises:
        DataError: there is no prompt in it, or more than one.
    """
    if not isinstance(value, Mapping):
        return Conversation.of(value)  # type: ignore[arg-type] # what it is, a conversation checks
    columns = columns or Columns()
    prompt = _prompt(value, columns, is_table=is_table)
    made = Conversation.of(chat_of(prompt) if is_table else prompt)
    system = columns.find(value, "system", SYSTEMS)
    # An empty system prompt in JSON is one: it stands in the place of the template's own.
    if system is not None and value[system] is not None and not (is_table and value[system] == ""):
        check_text(system, value[system])
        made = with_system(made, value[system])
    return made


def _prompt(row: Mapping[str, Any], columns: Columns, *, is_table: bool) -> Any:
    """What stands in the prompt's column."""
    text, chat = columns.find(row, "prompt", PROMPTS), columns.find(row, "prompt", CHATS)
    if (text is None and chat is None) or (text == "prompt" and chat is not None and text != chat):
        raise DataError(
            f"give 'prompt' or 'messages', or name its column (--columns prompt=NAME); the object has "
            f"{columns.told(row)}"
        )
    name = chat if chat is not None else text
    found = row[str(name)]
    if is_table and found in (None, ""):
        raise DataError(f"the cell of {name!r} is empty; give a prompt, or leave the row out")
    more = row.get("input") if name == "instruction" else None
    if isinstance(found, str) and isinstance(more, str) and more.strip():
        return f"{found}\n\n{more}"
    return found


def flag(row: Mapping[str, Any], key: str, *, is_table: bool) -> bool:
    """Whether a row says yes to something; without a word it does not.

    Args:
        row: the row.
        key: `raw` or `held_out`.
        is_table: the cells may be text, and an empty one is a missing one.

    Raises:
        DataError: it says neither true nor false.
    """
    value = row.get(key, False)
    if is_table and not isinstance(value, bool):
        value = {"": False, "none": False, "true": True, "1": True, "false": False, "0": False}.get(
            str(value).strip().casefold(), value
        )
    if not isinstance(value, bool):
        raise DataError(f"{key} is true or false, got {reprlib.repr(value)}")
    return value


def chat_of(value: Any) -> Any:
    """A chat or a message that a table holds as text, JSON or Python's way to write it; anything else as it is.

    Args:
        value: of a cell.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[{", "{")) and value.rstrip().endswith(("}]", "}")):
        for read in (json.loads, ast.literal_eval):
            try:
                found = read(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if is_chat(found) or is_chat([found]):
                return found
    return value


def as_raw(one: Conversation, *, raw: bool, escapes: bool = False) -> Conversation:
    r"""A conversation without the chat template, its written line breaks read.

    Args:
        one: the conversation.
        raw: leave its prompt as it is.
        escapes: read a written ``\n`` as a line break.

    Raises:
        DataError: a list of messages or a system prompt cannot be raw.
    """
    if escapes and isinstance(one.prompt, str):
        answer = None if one.answer is None else unescaped(one.answer)
        one = replace(one, prompt=unescaped(one.prompt), answer=answer)
    return Conversation.of(one, raw=True) if raw else one


def unescaped(text: str) -> str:
    """A text with written line breaks and tabs as characters.

    Args:
        text: any text.

    Example:
        >>> unescaped("one" + chr(92) + "ntwo").splitlines()
        ['one', 'two']
    """
    parts, at = [], 0
    while at < len(text):
        found = _ESCAPES.get(text[at : at + 2])
        parts.append(text[at] if found is None else found)
        at += 1 if found is None else 2
    return "".join(parts)


def plain_prompt(one: Conversation) -> str | list[dict[str, Any]]:
    """A prompt as JSON holds it: a text, or a list of messages where there is more to it.

    Args:
        one: the prompt.
    """
    if isinstance(one.prompt, str):
        if one.system is None and one.answer is None:
            return one.prompt
        turns = [] if one.system is None else [{"role": "system", "content": one.system}]
        turns.append({"role": "user", "content": one.prompt})
    else:
        turns = [dict(turn) for turn in one.prompt]
    return turns if one.answer is None else [*turns, {"role": "assistant", "content": one.answer}]
