"""Rubrics filled with what is to be rated."""

from __future__ import annotations

import re
from collections.abc import Mapping

from steerkit.prompts.conversation import Conversation

__all__ = ["fill", "last_question"]

_PLACEHOLDER = re.compile(r"(^> ?)?\{(\w+)\}", re.MULTILINE)


def fill(rubric: str, values: Mapping[str, str]) -> str:
    r"""Replace the placeholders of a rubric; a placeholder inside of a text that is put in stays as it is.

    A placeholder behind "> " at the start of its line keeps every line of its text behind such a mark, so that no text
    can pass for the rubric's own words.

    Args:
        rubric: with placeholders such as ``{answer}``; other braces are left as they are.
        values: the text for each name.

    Example:
        >>> fill("Rate this:\n> {answer}\nAs asked: {question}", {"answer": "Fine.\n{question}", "question": "{}"})
        'Rate this:\n> Fine.\n> {question}\nAs asked: {}'
    """

    def put(found: re.Match[str]) -> str:
        if found[2] not in values:
            return found[0]
        text = values[found[2]]
        return text if found[1] is None else "\n".join(f"> {line}" for line in text.splitlines() or [""])

    return _PLACEHOLDER.sub(put, rubric)


def last_question(conversation: Conversation) -> str:
    """What was asked last: a string prompt, or the last user turn of a list of messages.

    Args:
        conversation: a prompt.
    """
    if isinstance(conversation.prompt, str):
        return conversation.prompt
    asked = [turn["content"] for turn in conversation.prompt if turn["role"] == "user"]
    return str(asked[-1] if asked else conversation.prompt[-1]["content"])
