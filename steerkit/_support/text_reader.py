"""Reading the text of a steering: a place that goes on, names, numbers, and errors that point at a column."""

from __future__ import annotations

import json
import re
from typing import Any

from steerkit.errors import CompositionError, SteerError

__all__ = ["TextReader", "check_name", "name_text", "number_text"]

LONGEST_NAME = 1000
_SPACE = re.compile(r"\s*")
_BARE = re.compile(r"(?:hub:)?[\w./]+(?:-+[\w./]+)*")
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')
_WORD = re.compile(r"\w{1,20}")
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


class TextReader:
    """A place in a text that goes on while it is read.

    Args:
        text: what is read.
        what: what to call it in errors.
    """

    def __init__(self, text: str, what: str = "steering") -> None:
        self.text, self.what, self.at = text, what, 0

    def error(self, what: str, at: int | None = None) -> CompositionError:
        """The error for what stands at a place.

        Args:
            what: is wrong.
            at: where, counted from 0; None is here.
        """
        at = self.at if at is None else at
        is_long = len(self.text) > 80
        start, end = (max(at - 30, 0), at + 30) if is_long else (0, len(self.text))
        shown = ("..." if start else "") + self.text[start:end] + ("..." if end < len(self.text) else "")
        return CompositionError(f"{self.what} {shown!r}, column {at + 1}: {what}")

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """What fits here, and the place behind it.

        Args:
            pattern: to be matched here.
        """
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def here(self) -> str:
        """The next character that is no space; empty at the end."""
        self.take(_SPACE)
        return self.text[self.at : self.at + 1]

    def piece(self) -> str:
        """What stands here, to be shown: a word or a character."""
        word = _WORD.match(self.text, self.at)
        return word[0] if word else self.text[self.at : self.at + 1] or "the end"

    def number(self, what: str) -> float:
        """The number that stands here.

        Args:
            what: such a number is, with an example, for the error.

        Raises:
            CompositionError: none stands here.
        """
        self.here()
        found = self.take(NUMBER)
        if not found:
            raise self.error(f"got {self.piece()!r} where {what}")
        return float(found[0])

    def name(self) -> str:
        """The name of a vector that stands here.

        Raises:
            CompositionError: none stands here.
        """
        self.here()
        start, bare = self.at, self.take(_BARE)
        quoted = None if bare else self.take(_QUOTED)
        if not bare and not quoted:
            if self.text[start : start + 1] == '"':
                raise self.error('the quotation mark " is never closed')
            raise self.error(f"got {self.piece()!r} where the name of a vector stands")
        name = bare[0] if bare else re.sub(r"\\(.)", r"\1", quoted[1] if quoted else "")
        if bare and NUMBER.fullmatch(name) and self.here() == "*":
            raise self.error(f"the strength stands behind the vector, as in optimism-caa*{name}", start)
        try:
            check_name(name)
        except SteerError as error:
            raise self.error(str(error), start) from None
        return name


def check_name(name: Any) -> None:
    """Refuse what cannot be the name of a vector.

    Args:
        name: a file, or the name of a shipped vector.

    Raises:
        CompositionError: it is no text, empty, too long, or holds what cannot be printed.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
        raise CompositionError(
            f"got {repr(name)[:40]} for a vector's name; give a file or a shipped name of at most {LONGEST_NAME} "
            "printable characters"
        )


def name_text(name: str) -> str:
    """A name as it stands in a text: in quotes where it has to.

    Args:
        name: of a vector.
    """
    is_plain = _BARE.fullmatch(name) and not NUMBER.fullmatch(name)
    return name if is_plain else json.dumps(name, ensure_ascii=False)


def number_text(value: float) -> str:
    """The shortest text that gives a number back.

    Args:
        value: the number.
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
