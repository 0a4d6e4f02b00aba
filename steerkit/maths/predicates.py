"""Rules over named conditions: `P("harmful") & ~P("fiction")`, built from objects and evaluated per row.

A rule is built with `&`, `|` and `~`; Python's own brackets bracket it. It is evaluated once, when all conditions are
known, and a behaviour that several rules name is applied once. A name that no condition bears is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steerkit.errors import FitError, unknown_name

__all__ = ["P", "Predicate", "fired"]


@dataclass(frozen=True)
class Predicate:
    """A rule: one condition, or rules joined by `and`, `or`, `not`. Made with `P`, `&`, `|` and `~`.

    Attributes:
        operation: ``name``, ``and``, ``or`` or ``not``.
        parts: the condition's name, or the rules that are joined.
    """

    operation: str
    parts: tuple[Any, ...]

    def __and__(self, other: Predicate) -> Predicate:
        return Predicate("and", (self, _checked(other)))

    def __or__(self, other: Predicate) -> Predicate:
        return Predicate("or", (self, _checked(other)))

    def __invert__(self) -> Predicate:
        return Predicate("not", (self,))

    def __bool__(self) -> bool:
        raise TypeError("a predicate has no truth value before it is evaluated; join predicates with & | ~")

    @property
    def names(self) -> tuple[str, ...]:
        """The conditions it asks about, each once, in the order they stand."""
        if self.operation == "name":
            return self.parts
        return tuple(dict.fromkeys(name for part in self.parts for name in part.names))

    def __call__(self, met: Mapping[str, Tensor]) -> Tensor:
        """Evaluate for every row.

        Args:
            met: condition to [b] bool, whether a row meets it.

        Returns:
            [b] bool.

        Raises:
            UnknownNameError: it asks about a condition that is not there.
        """
        if self.operation == "name":
            name = str(self.parts[0])
            if name not in met:
                raise unknown_name("condition", name, met)
            return met[name]
        found: list[Tensor] = [part(met) for part in self.parts]
        if self.operation == "not":
            return ~found[0]
        return found[0] & found[1] if self.operation == "and" else found[0] | found[1]

    @property
    def data(self) -> tuple[Any, ...]:
        """The rule as nested tuples, as files hold it: ``("and", ("name", "harmful"), ("not", ...))``."""
        parts = self.parts if self.operation == "name" else tuple(part.data for part in self.parts)
        return (self.operation, *parts)

    @classmethod
    def from_data(cls, data: Any) -> Predicate:
        """Read a rule from nested tuples or lists.

        Args:
            data: what `data` gave.

        Raises:
            FitError: it is no such rule.
        """
        sizes = {"name": 1, "not": 1, "and": 2, "or": 2}
        listed = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else []
        if not listed or sizes.get(listed[0] if isinstance(listed[0], str) else "") != len(listed) - 1:
            raise FitError(f"{data!r} is no rule; write P('name') with & | ~")
        if listed[0] == "name":
            return P(listed[1])
        return cls(listed[0], tuple(cls.from_data(part) for part in listed[1:]))

    def __str__(self) -> str:
        if self.operation == "name":
            return str(self.parts[0])
        if self.operation == "not":
            return f"~{self.parts[0]}"
        sign = " & " if self.operation == "and" else " | "
        return f"({sign.join(map(str, self.parts))})"


def P(name: str) -> Predicate:
    """The rule that one condition is met.

    Args:
        name: the condition's.

    Raises:
        FitError: an empty name, or none.
    """
    if not isinstance(name, str) or not name:
        raise FitError(f"{name!r} is no name of a condition; give a text")
    return Predicate("name", (name,))


def fired(rules: Iterable[tuple[Predicate, str]], met: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which behaviours are to be applied to which rows.

    Args:
        rules: a predicate and the behaviour it asks for; several may ask for one behaviour.
        met: condition to [b] bool.

    Returns:
        behaviour to [b] bool; a row gets each behaviour once, however many rules ask for it.

    Raises:
        UnknownNameError: a rule asks about a condition that is not there.
    """
    found: dict[str, Tensor] = {}
    for rule, behaviour in rules:
        flags = rule(met)
        found[behaviour] = found[behaviour] | flags if behaviour in found else flags
    return found


def _checked(other: object) -> Predicate:
    if not isinstance(other, Predicate):
        raise TypeError(f"{other!r} is no predicate; write P({other!r})")
    return other
