"""Checks of a trait's texts: none is empty, stands there twice, or is another type than text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from steerkit.errors import DataError
from steerkit.persona.instruction import is_open

__all__ = ["check_once", "check_strings", "check_text", "same_text", "text_of"]


def same_text(one: str, other: str) -> bool:
    """Compare two texts, capital letters and white space left aside.

    Args:
        one: a text.
        other: another.
    """
    return " ".join(one.casefold().split()) == " ".join(other.casefold().split())


def check_once(what: str, texts: Sequence[str]) -> None:
    """Refuse a text that stands there twice.

    Args:
        what: what the texts are, for the message.
        texts: all of them; places that nobody has written yet may be alike.

    Raises:
        DataError: two are the same.
    """
    seen: dict[str, int] = {}
    for number, text in enumerate(texts, start=1):
        key = " ".join(text.casefold().split())
        if key in seen and not is_open(text):
            raise DataError(f"{what} {number} is {what} {seen[key]} again; give another one")
        seen.setdefault(key, number)


def check_text(name: str, value: object, *, empty: bool = False) -> None:
    """Refuse a value that is no text, is empty, or cannot be encoded.

    Args:
        name: of the value, for the message.
        value: what should be a text.
        empty: whether it may be empty.

    Raises:
        DataError: it is no text, empty, or has half of a surrogate pair in it.
    """
    text = text_of(name, value)
    if not empty and not text.strip():
        raise DataError(f"{name}: is empty; write it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name}: character {error.start} is a lone surrogate, which is not text") from None


def check_strings(name: str, values: Iterable[object], *, empty: bool = False) -> None:
    """Check each of several texts as `check_text` does.

    Args:
        name: of the values, for the message.
        values: what should be texts.
        empty: whether they may be empty.

    Raises:
        DataError: see `check_text`.
    """
    for number, value in enumerate(values, start=1):
        check_text(f"{name}, number {number}", value, empty=empty)


def text_of(name: str, value: object) -> str:
    """Give a value back as the text that it is.

    Args:
        name: of the value, for the message.
        value: what should be a text.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, str):
        raise DataError(f"{name}: expected a text, got {type(value).__name__}")
    return value
