"""Plain features of a text (length, position, format) that may tell two sides apart by accident."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from typing import Literal, NamedTuple

from steerkit.activations.readout import Readout
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered

__all__ = ["Category", "Item", "Number", "features", "item_of"]

_QUOTES = '"“”„«»'
_BULLETS = ("-", "*", "•", "\u2013")
_CLASSES = {"Lu": "a capital letter", "Ll": "a small letter", "Lt": "a capital letter", "Nd": "a digit"}
_SENTENCE_START = re.compile(r"(?:^|[.!?\n])\W*\w")


class Item(NamedTuple):
    """One item: what is compared, and where it stands."""

    text: str
    tokens: int
    start: int
    read: int | None


class Number(NamedTuple):
    """A feature that is a number.

    Attributes:
        name: of the feature.
        kind: length, position or format.
        phrase: what items with more of it do, in words.
        of: gives the number of an item.
    """

    name: str
    kind: Literal["length", "position", "format"]
    phrase: str
    of: Callable[[Item], float]


class Category(NamedTuple):
    """A feature that is one of several words, such as the first word.

    Attributes:
        name: of the feature.
        phrase: what such a word does with an item, in words.
        of: gives the word of an item.
    """

    name: str
    phrase: str
    of: Callable[[Item], str]


def item_of(item: Conversation, rendered: Rendered, plan: Readout | None) -> Item:
    """What is compared of a conversation: its answer, else its prompt with its system prompt.

    Args:
        item: the conversation.
        rendered: the same as the model reads it.
        plan: which tokens will be read; None leaves their place out.
    """
    read = None if plan is None else plan.tokens(rendered)[0]
    start = rendered.prompt_length
    if item.answer is not None:
        return Item(item.answer, len(rendered.ids) - start, start, read)
    if isinstance(item.prompt, str):
        parts = [item.prompt] if item.system is None else [item.system, item.prompt]
    else:
        parts = [message["content"] for message in item.prompt]
    return Item("\n".join(parts), start, start, read)


def features(is_read: bool) -> list[Number | Category]:
    """Everything that is compared, in the order of the kinds.

    Args:
        is_read: whether it is known which token will be read.
    """
    counted = {
        "line breaks": lambda text: text.count("\n"),
        "list lines": _list_lines,
        "digits": lambda text: sum(map(str.isdigit, text)),
        "quotation marks": lambda text: sum(map(text.count, _QUOTES)),
        "question marks": lambda text: text.count("?"),
        "exclamation marks": lambda text: text.count("!"),
        "commas": lambda text: text.count(","),
    }
    found: list[Number | Category] = [
        Number("tokens", "length", "have more tokens", lambda item: item.tokens),
        Number("characters", "length", "have more characters", lambda item: len(item.text)),
        Number("answer start", "position", "start at a later token", lambda item: item.start),
    ]
    if is_read:
        found.append(Number("token read", "position", "are read at a later token", lambda item: item.read or 0))
    found += [Number(name, "format", f"have more {name}", _of_text(count)) for name, count in counted.items()]
    found += [
        Number("share of capitals", "format", "have a larger share of capital letters", _of_text(_capitals)),
        Number("full stop at the end", "format", "more often end with a full stop", _of_text(_ends_in_stop)),
        Number("other end mark", "format", "more often end with another mark", _of_text(_ends_in_mark)),
        Category("first character", "starts", lambda item: _class_of(item.text)),
        Category("first word", "starts", lambda item: _first_word(item.text)),
        Category("last character", "ends", lambda item: item.text.rstrip()[-1:]),
    ]
    return found


def _of_text(count: Callable[[str], float]) -> Callable[[Item], float]:
    return lambda item: count(item.text)


def _list_lines(text: str) -> int:
    """Lines that start like those of a list: "- ", "* ", "1. ", "2) "."""
    found = 0
    for line in text.split("\n"):
        mark = line.split(maxsplit=1)[0] if line.strip() else ""
        found += mark in _BULLETS or (mark[-1:] in (".", ")") and mark[:-1].isdigit())
    return found


def _capitals(text: str) -> float:
    """Share of the letters, those that begin a sentence left out: they only say how long sentences are."""
    letters = [character for character in _SENTENCE_START.sub(" ", text) if character.isalpha()]
    return sum(map(str.isupper, letters)) / max(len(letters), 1)


def _ends_in_stop(text: str) -> float:
    return float(text.rstrip().endswith("."))


def _ends_in_mark(text: str) -> float:
    last = text.rstrip()[-1:]
    return float(last != "." and unicodedata.category(last or "a").startswith(("P", "S")))


def _class_of(text: str) -> str:
    """What kind of character a text begins with."""
    first = text.lstrip()[:1]
    category = unicodedata.category(first) if first else ""
    return _CLASSES.get(category, "a mark" if category[:1] in ("P", "S") else "another character")


def _first_word(text: str) -> str:
    """The first word in small letters, without the marks around it, so that "(A)" is "a"."""
    word = (text.split(maxsplit=1) or [""])[0].casefold()
    return word.strip(string.punctuation) or word
