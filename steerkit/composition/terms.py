"""`Composition`: what a steering is made of, as a plain object that is equal to its text and to its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steerkit._support.text_reader import check_name
from steerkit.errors import CompositionError, near_miss
from steerkit.tokens.fade import Fade
from steerkit.tokens.scope import ANSWER, Scope
from steerkit.vector.frozen import float32_number, whole_number
from steerkit.vector.hold import Hold
from steerkit.vector.when import When

if TYPE_CHECKING:
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["MOST_TERMS", "Composition", "Term"]

MOST_TERMS, MOST_TOKENS = 256, 10**9 - 1


@dataclass(frozen=True)
class Term:
    """One vector of a composition.

    Attributes:
        vector: a vector file, or the name of a shipped vector.
        strength: how strongly it is applied; None takes the strength that its file suggests.
        unit: what the strength counts in; None takes the file's.
        scope: which tokens are written; None takes the file's.
        window: the stretch (from, to) of generated tokens that is steered, counted from 0, `to` left out; None for
            `to` has no end. Beside it the scope is `response`, `generated` or None.
        without: name of another vector, whose direction is projected off this one's.
        minus: minus the strength that the file suggests; with a strength of its own, that one is negative instead.
        fade: how the strength goes on while tokens are generated; its end has its own sign.
        when: on which readings it is applied; None always.
        hold: which reading the strength is found by; it then has no other strength.
        column: where it stands in the text it was read from, counted from 1; no part of the composition.

    Raises:
        CompositionError: a name, a unit or a window that is none, or two things that exclude each other.
        StrengthError: a strength that is no finite number.
        ScopeError: no scope of that name, or a window that ends before it begins.

    Example:
        >>> str(Term("formal-persona", strength=-0.8, scope="answer"))
        '- formal-persona@answer*0.8'
    """

    vector: str
    strength: float | None = None
    unit: Literal["paper", "norm"] | None = None
    scope: str | None = None
    window: tuple[int, int | None] | None = None
    without: str | None = None
    minus: bool = False
    fade: Fade | None = None
    when: When | None = None
    hold: Hold | None = None
    column: int | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in (self.vector, *([] if self.without is None else [self.without])):
            check_name(name)
        if self.strength is not None:
            object.__setattr__(self, "strength", float32_number("strength", self.strength))
        if self.unit is not None and self.unit not in ("paper", "norm"):
            raise CompositionError(f"unknown unit {str(self.unit)[:40]!r}; {near_miss(str(self.unit)[:40], UNITS)}")
        if self.unit is not None and self.strength is None:
            raise CompositionError(f"unit {self.unit!r} counts nothing: give a strength too")
        if not isinstance(self.minus, bool) or (self.minus and self.strength is not None):
            raise CompositionError("minus stands for minus the suggested strength; a given strength is negative itself")
        if self.scope is not None:
            object.__setattr__(self, "scope", str(Scope.parse(_text("scope", self.scope))))
        for name, kind in (("fade", Fade), ("when", When), ("hold", Hold)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind.parse(getattr(self, name)))
        if self.hold is not None and (self.strength is not None or self.minus or self.fade is not None):
            raise CompositionError("hold finds the strength itself; leave *, - and fade out, and give its limits")
        if self.window is not None:
            object.__setattr__(self, "window", _checked_window(self.window))
            if self.scope not in (None, *ANSWER):
                raise CompositionError(
                    f"a window counts generated tokens, and scope '{self.scope}' does not; leave one of them out, or "
                    "use response or generated"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all vectors that it needs: the one that is applied, and those that are projected off or read."""
        read = () if self.when is None else self.when.readings
        held = () if self.hold is None else (self.hold.reading,)
        return tuple(dict.fromkeys([self.vector, *([] if self.without is None else [self.without]), *read, *held]))

    def scope_on(self, vector: SteeringVector) -> str | None:
        """The scope that the term's vector gets; None leaves it its own.

        Args:
            vector: the vector that the term names. A window falls into its own scope where that is `response` or
                `generated`, else into `response`.
        """
        if self.window is None:
            return self.scope
        own = Scope.parse(vector.scope).kind
        start, end = self.window
        return str(Scope.window(self.scope or (own if own in ANSWER else "response"), start, end))

    def __str__(self) -> str:
        from steerkit.composition.expression import printed

        return printed((self,))


UNITS = ("paper", "norm")


@dataclass(frozen=True)
class Composition:
    """Several vectors, applied together in this order.

    The same composition is a line of text (`parse`, `str`), plain data (`from_json`, `as_json`) and a file (`load`,
    `save`), and each gives back the other. `steer`, `generate` and whatever else takes vectors take it, or its text.

    Attributes:
        terms: one or more.

    Raises:
        CompositionError: no term, or too many.

    Example:
        >>> mixed = Composition.parse("optimism-caa*1.5 + formal-persona@answer*0.8 - pirate-persona[8:40]")
        >>> [term.strength for term in mixed.terms], mixed.terms[2].window
        ([1.5, 0.8, None], (8, 40))
        >>> Composition.from_json(mixed.as_json()) == mixed
        True
        >>> print(mixed)
        optimism-caa*1.5 + formal-persona@answer*0.8 - pirate-persona[8:40]
    """

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        if not all(isinstance(term, Term) for term in self.terms):
            raise CompositionError("a composition consists of terms; give a tuple of Term")
        if not 1 <= len(self.terms) <= MOST_TERMS:
            raise CompositionError(f"got {len(self.terms)} vectors; give 1 to {MOST_TERMS}")

    @classmethod
    def parse(cls, text: str | Composition) -> Composition:
        """Read a composition from its text.

        Args:
            text: vectors with + and - between them. Behind a vector may stand `~other` (its direction without that of
                another vector), `@scope`, `[from:to]` (generated tokens, counted from 0), `*strength` and, behind a
                strength, its unit, `fade(linear over 40 to 0.5)`, `when(other > 1.5)` and `hold(other at 2 within 0 to
                3)`.

        Raises:
            CompositionError: the text is none; the message names the column.
        """
        from steerkit.composition.expression import parsed

        return text if isinstance(text, Composition) else cls(parsed(_text("steering", text)))

    def __str__(self) -> str:
        from steerkit.composition.expression import printed

        return printed(self.terms)

    @classmethod
    def from_json(cls, data: Any) -> Composition:
        """Read a composition from plain data, as `json.loads` gives it.

        Args:
            data: as the schema beside this module says (`steerkit/composition/schema.json`).

        Raises:
            CompositionError: it is not of that form; the message names the term.
        """
        from steerkit.composition.json_form import terms_of

        return cls(terms_of(data))

    def as_json(self) -> dict[str, Any]:
        """The composition as plain data: what is left to the files is left out."""
        from steerkit.composition.json_form import plain

        return plain(self.terms)

    @classmethod
    def load(cls, path: str | Path) -> Composition:
        """Read a composition file.

        Args:
            path: a file that ends in .json and holds the plain data, or any other with the text.

        Raises:
            CompositionError: there is no such file, or it holds no composition.
        """
        from steerkit.composition.json_form import read_file

        return cls(read_file(Path(path)))

    def save(self, path: str | Path) -> Path:
        """Write a composition file, whole or not at all.

        Args:
            path: with the ending .json the plain data is written, else the text.

        Returns:
            The path.

        Raises:
            CompositionError: it cannot be written there.
        """
        from steerkit.composition.json_form import write_file

        write_file(Path(path), self)
        return Path(path)

    def vectors(self, known: Mapping[str, SteeringVector] | None = None, *, model: str = "") -> list[SteeringVector]:
        """The vectors, each with the strength, the scope and the unit that the composition gives it.

        Args:
            known: vectors by name, which come before files and shipped vectors of that name.
            model: alias of the model in use, whose shipped vectors come first.

        Raises:
            SteerError: a name that nothing answers to, a file that is no vector, or a term that its vector cannot do;
                the message names the term, or its column.
        """
        from steerkit.composition.binding import bound

        return bound(self.terms, known or {}, model)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise CompositionError(f"{name}: got {repr(value)[:40]}; give a text")
    return value


def _checked_window(window: Any) -> tuple[int, int | None]:
    try:
        start, end = window
        start, end = whole_number(start), None if end is None else whole_number(end)
    except (TypeError, ValueError):
        raise CompositionError(f"window: got {repr(window)[:40]}; give two whole numbers, from and to") from None
    if not 0 <= start <= MOST_TOKENS or not 0 <= (end or 0) <= MOST_TOKENS:
        raise CompositionError(f"window: got {start} to {end}; tokens are counted from 0 to {MOST_TOKENS}")
    Scope.window("response", start, end)
    return start, end
