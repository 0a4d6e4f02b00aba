"""Parts of a trait specification read out of a model's reply, whole or cut off."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from steerkit.persona.instruction import FILL_IN, Instruction

__all__ = ["SCALE", "opposite_in", "pairs_in", "questions_in", "scale_in"]

SCALE = (0, 25, 50, 75, 100)
"""Points of the scale that a rubric describes."""
_SIDES = ("positive", "negative")
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_ITEM = re.compile(r"^\s*(?:[-*\u2022]|\d{1,3}[.):])\s+(.+?)\s*$", re.MULTILINE)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every whole JSON object in a text, from left to right, those inside of others only where these are torn."""
    decoder, place = json.JSONDecoder(strict=False), text.find("{")
    while place >= 0:
        try:
            found, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            yield found
        place = text.find("{", end)


def _inner(value: Any) -> Iterator[dict[str, Any]]:
    """An object, and all those inside of it."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _inner(one)


def _clean(value: Any) -> str:
    """A text on one line, "" for anything else and for what only marks a place."""
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return "" if not text.strip(". \u2026") or FILL_IN in text or not _is_text(text) else text


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of an escaped pair
        return False
    return True


def opposite_in(reply: str, trait: str) -> str | None:
    """What the opposite assistant is called: something else than the trait's.

    Args:
        reply: of the model.
        trait: the trait's name.
    """
    for found in _objects(_said(reply)):
        name = _clean(found.get("opposite"))
        if name and len(name) <= 40 and name.casefold() != " ".join(trait.casefold().split()):
            return name
    return None


def pairs_in(reply: str) -> Iterator[Instruction]:
    """Pairs of instructions: objects with both sides, wherever they stand in the reply.

    Args:
        reply: of the model.
    """
    for outer in _objects(_said(reply)):
        for found in _inner(outer):
            sides = [_clean(found.get(side, found.get(side[:3]))) for side in _SIDES]
            if all(sides) and sides[0].casefold() != sides[1].casefold():
                yield Instruction(*sides)


def questions_in(reply: str) -> Iterator[str]:
    """Texts of a JSON list, whole or cut off; where there is none, the items of a list of lines.

    Args:
        reply: of the model.
    """
    said = _said(reply)
    start = said.find("[")
    if start >= 0:
        found = (_unquoted(match[0]) for match in _STRING.finditer(said, start))
    else:
        found = (match[1].strip("\"'*") for match in _ITEM.finditer(said))
    # Short ones are keys of objects, such as "question".
    yield from (text for text in map(_clean, found) if len(text.split()) >= 3)


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return ""


def scale_in(reply: str) -> dict[str, str]:
    """What is there of the rubric's parts.

    Args:
        reply: of the model.
    """
    wanted = ("counts", "does_not_count", *map(str, SCALE))
    parts: dict[str, str] = {}
    for found in _objects(_said(reply)):
        parts |= {key: text for key in wanted if (text := _clean(found.get(key))) and not set(text) & set("{}")}
    return parts


def _said(reply: str) -> str:
    """A reply without what was thought before it."""
    return reply.rpartition("</think>")[2]
