"""The text of a composition, read and printed.

    composition   [-] term { + term | - term }
    term          name { ~name | @scope | [from:to] | *strength [unit] | fade(shape over n [to strength])
                         | when(rule) | hold(name at number within number to number) }
    name          letters, digits, _ . / and -, hub: before them or not, or anything "in quotes"

What stands behind a name stands there once, in any order. A minus that parts two vectors has a space before it, because
names have hyphens. What is printed is read again as the same composition, and the same composition is always printed as
the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from steerkit._support.text_reader import TextReader, name_text, number_text
from steerkit.composition.terms import MOST_TERMS, UNITS, Term
from steerkit.errors import CompositionError, SteerError, near_miss
from steerkit.tokens.fade import Fade
from steerkit.vector.hold import read_hold
from steerkit.vector.when import read_when

__all__ = ["parsed", "printed"]

_LONGEST = 100_000
_WORD = re.compile(r"\s*([A-Za-z_]+)\b(?!\s*\()")
_SCOPE = re.compile(r"\s*([A-Za-z_]+(?:\([^()]{0,40}\))?)")
_WINDOW = re.compile(r"\s*([0-9]{0,9})\s*:\s*([0-9]{0,9})\s*\]")
_CALLED, _FADE = re.compile(r"(fade|when|hold)\s*\("), re.compile(r"\s*\(([^()]{0,60})\)")
_FOLLOWS = (
    "behind a vector may stand ~other, @scope, [from:to], *strength, fade(linear over 40), when(other > 1.5) and "
    "hold(other at 2 within 0 to 3), and then + or - and the next vector"
)
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2212"


def parsed(text: str) -> tuple[Term, ...]:
    """The terms of a composition's text.

    Args:
        text: see the module.

    Raises:
        CompositionError: it is none; the message names the column, counted from 1.
    """
    if len(text) > _LONGEST:
        raise CompositionError(f"steering: {len(text)} characters are too many for a composition (at most {_LONGEST})")
    reader = _Reader(text)
    terms: list[Term] = []
    sign = reader.sign(first=True)
    while sign:
        if len(terms) == MOST_TERMS:
            raise reader.error(f"more than {MOST_TERMS} vectors")
        terms.append(reader.term(sign))
        sign = reader.sign()
    return tuple(terms)


def printed(terms: Sequence[Term]) -> str:
    """The text of a composition.

    Args:
        terms: its terms.
    """
    text = ""
    for number, term in enumerate(terms):
        is_minus = term.minus or (term.strength or 0.0) < 0
        text += ((" - " if is_minus else " + ") if number else "- " if is_minus else "") + _printed(term)
    return text


def _printed(term: Term) -> str:
    """A term without its sign."""
    text = name_text(term.vector)
    if term.without is not None:
        text += f"~{name_text(term.without)}"
    if term.scope is not None:
        text += f"@{term.scope}"
    if term.window is not None:
        text += f"[{term.window[0] or ''}:{'' if term.window[1] is None else term.window[1]}]"
    if term.strength is not None:
        text += f"*{number_text(abs(term.strength))}"
    if term.unit is not None:
        text += f" {term.unit}"
    is_minus = term.minus or (term.strength or 0.0) < 0
    fade = None if term.fade is None else _turned(term.fade, is_minus)
    said = {"fade": fade, "hold": term.hold, "when": term.when}
    return text + "".join(f" {name}({one})" for name, one in said.items() if one is not None)


def _turned(fade: Fade, is_minus: bool) -> Fade:
    """A fade as it stands behind a sign, or as it is without one."""
    return replace(fade, to=-fade.to) if is_minus else fade


class _Reader(TextReader):
    """Reads the terms of a composition."""

    def sign(self, *, first: bool = False) -> int:
        """1 or -1 before a term; 0 at the end."""
        mark = self.here()
        if mark in ("+", "-") and mark:
            self.at += 1
            return 1 if mark == "+" else -1
        if first and not mark:
            raise self.error("the text is empty; give the name of a vector")
        if first or not mark:
            return int(first)
        if mark in _DASHES:
            raise self.error(f"{mark!r} is a dash; write a minus as -")
        raise self.error(f"got {self.piece()!r}; {_FOLLOWS}")

    def term(self, sign: int) -> Term:
        """A vector and what stands behind it."""
        self.here()
        start = self.at
        found: dict[str, Any] = {"vector": self.name()}
        while mark := self._mark():
            at, (name, read) = self.at, _PARTS[mark]
            if name in found:
                raise self.error(f"a second {name.replace('without', '~other')} of one vector; leave one out")
            self.at += len(mark)
            self.here()
            found |= read(self)
            self._check(found, at)
        if "strength" in found:
            found["strength"] *= sign
        if "fade" in found:
            found["fade"] = _turned(found["fade"], sign < 0)
        found["minus"] = sign < 0 and "strength" not in found
        self._check(found, start)
        return Term(**found, column=start + 1)

    def _mark(self) -> str:
        """What begins a part of a term here; empty where nothing does."""
        mark = self.here()
        called = _CALLED.match(self.text, self.at)
        if called:
            return called[1]
        return mark if mark in _PARTS else ""

    def _check(self, found: dict[str, Any], at: int) -> None:
        """Have the term look at what there is so far, so that an error points at what was read last."""
        try:
            Term(**found)
        except SteerError as error:
            raise self.error(str(error), at) from None

    def without(self) -> dict[str, Any]:
        """The vector behind a ~."""
        return {"without": self.name()}

    def scope(self) -> dict[str, Any]:
        """The scope behind an @."""
        found = self.take(_SCOPE)
        if not found:
            raise self.error(f"got {self.piece()!r} where a scope stands, such as @answer or @first(4)")
        return {"scope": found[1]}

    def window(self) -> dict[str, Any]:
        """The numbers behind a [."""
        found = self.take(_WINDOW)
        if not found:
            raise self.error(f"got {self.piece()!r} where a window of generated tokens stands, such as [8:40] or [8:]")
        return {"window": (int(found[1] or 0), int(found[2]) if found[2] else None)}

    def strength(self) -> dict[str, Any]:
        """The number behind a *, and its unit."""
        strength = {"strength": self.number("a strength stands, such as *1.5")}
        self.here()
        at, unit = self.at, self.take(_WORD)
        if not unit:
            return strength
        if unit[1] not in UNITS:
            raise self.error(f"unknown unit {unit[1][:20]!r}; {near_miss(unit[1][:20], UNITS)}", at)
        return {**strength, "unit": unit[1]}

    def fade(self) -> dict[str, Any]:
        """What stands in the brackets behind fade."""
        start, found = self.at, self.take(_FADE)
        if not found:
            raise self.error("a fade is written as fade(linear over 40) or fade(cosine over 40 to 0.5)")
        try:
            return {"fade": Fade.parse(found[1])}
        except SteerError as error:
            raise self.error(str(error), start) from None

    def when(self) -> dict[str, Any]:
        """What stands in the brackets behind when."""
        return {"when": self._in_brackets(read_when)}

    def hold(self) -> dict[str, Any]:
        """What stands in the brackets behind hold."""
        return {"hold": self._in_brackets(read_hold)}

    def _in_brackets(self, read: Callable[[TextReader], Any]) -> Any:
        """Read something up to the bracket that closes it."""
        self.at += 1
        found = read(self)
        if self.here() != ")":
            raise self.error(f"got {self.piece()!r} where ) closes the bracket")
        self.at += 1
        return found


_PARTS: dict[str, tuple[str, Callable[[_Reader], dict[str, Any]]]] = {
    "~": ("without", _Reader.without),
    "@": ("scope", _Reader.scope),
    "[": ("window", _Reader.window),
    "*": ("strength", _Reader.strength),
    "fade": ("fade", _Reader.fade),
    "when": ("when", _Reader.when),
    "hold": ("hold", _Reader.hold),
}
