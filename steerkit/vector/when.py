"""`When`: on which readings of a model a vector is applied.

    when        rule [per token]
    rule        comparison, ~ rule, rule & rule, rule | rule, ( rule )
    comparison  name > number [off number]        or with <

`name` is a vector that is read: how far the model's activations lie along it, in standard deviations of neutral texts
(the number that `steerkit.Monitor` shows). Without `per token` the prompt's last token decides for the whole answer;
with it every token decides for itself. `x > 1.5 off 0.5` opens above 1.5 and stays open until x is 0.5 or less.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from steerkit._support.text_reader import TextReader, check_name, name_text, number_text
from steerkit.errors import CompositionError, SteerError
from steerkit.maths.predicates import P, Predicate
from steerkit.vector.frozen import float32_number

if TYPE_CHECKING:
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Comparison", "When", "bound_reading", "named_at", "read_when"]

_MOST, _DEEPEST = 16, 16
_SIGN, _OFF, _PER_TOKEN = re.compile(r"[<>](?!=)"), re.compile(r"\s*off\b"), re.compile(r"\s*per\s+token\b")
_NUMBER = "a number stands, such as 1.5"


@dataclass(frozen=True)
class Comparison:
    """A reading beside a threshold.

    Attributes:
        reading: the vector that is read.
        value: the threshold, in standard deviations of neutral texts.
        above: whether it is met above the threshold, else below it.
        off: where it ends to be met, once it is; None is the threshold itself.

    Raises:
        CompositionError: a name that is none, or an `off` on the wrong side.
        StrengthError: a number that is not finite.
    """

    reading: str
    value: float
    above: bool = True
    off: float | None = None

    def __post_init__(self) -> None:
        check_name(self.reading)
        object.__setattr__(self, "value", float32_number("threshold", self.value))
        if self.off is not None:
            object.__setattr__(self, "off", float32_number("off", self.off))
            assert self.off is not None
            if self.off >= self.value if self.above else self.off <= self.value:
                side = "below" if self.above else "above"
                raise CompositionError(
                    f"off {number_text(self.off)} is not {side} {number_text(self.value)}, where this opens; give a "
                    f"number {side} it"
                )

    def __str__(self) -> str:
        sign = ">" if self.above else "<"
        text = f"{name_text(self.reading)} {sign} {number_text(self.value)}"
        return text if self.off is None else f"{text} off {number_text(self.off)}"

    @classmethod
    def parse(cls, text: str) -> Comparison:
        """Read a comparison from its text.

        Args:
            text: such as ``"refusal-caa > 1.5"``.

        Raises:
            CompositionError: the text is none; the message names the column.
        """
        reader = TextReader(text, "when")
        found = _RuleReader(reader).comparison()
        if reader.here():
            raise reader.error(_follows(reader))
        return found

    @property
    def data(self) -> dict[str, Any]:
        """The comparison as JSON holds it."""
        said: dict[str, Any] = {"reading": self.reading, "above" if self.above else "below": self.value}
        return said if self.off is None else {**said, "off": self.off}


@dataclass(frozen=True)
class When:
    """A rule over readings that decides for each row, once or for each token, whether a vector is applied.

    Attributes:
        rule: over comparisons, each named by its text.
        per_token: every token is decided by its own readings; else the prompt's last one decides for the answer.
        vectors: the vectors that are read, by name; empty in a text that has not been bound to any.
        columns: where the names stand in the text it was read from, counted from 1; no part of the rule.

    Raises:
        CompositionError: a rule over something else, one that is too long, or an `off` without `per token`.
        StrengthError: a number that is not finite.

    Example:
        >>> said = When.parse("refusal-caa>1.5 & ~(formal-persona < 0) per token")
        >>> print(said, said.per_token)
        refusal-caa > 1.5 & ~(formal-persona < 0) per token True
    """

    rule: Predicate
    per_token: bool = False
    vectors: tuple[tuple[str, SteeringVector], ...] = ()
    columns: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Predicate) or not isinstance(self.per_token, bool):
            raise CompositionError(f"when: got {repr(self.rule)[:40]}; give a rule, such as P('refusal-caa > 1.5')")
        if _depth(self.rule) > _DEEPEST or len(self.rule.names) > _MOST:
            raise CompositionError(f"when: more than {_MOST} comparisons, or brackets deeper than {_DEEPEST}")
        object.__setattr__(self, "rule", _over(self.rule, lambda name: str(Comparison.parse(name))))
        if not self.per_token and any(one.off is not None for one in self.comparisons.values()):
            raise CompositionError("when: off holds it open from token to token; write per token behind the rule")

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """The comparisons by their text, each once."""
        return {name: Comparison.parse(name) for name in self.rule.names}

    @property
    def readings(self) -> tuple[str, ...]:
        """Names of the vectors that are read, each once."""
        return tuple(dict.fromkeys(one.reading for one in self.comparisons.values()))

    @classmethod
    def parse(cls, text: str | When) -> When:
        """Read a rule from its text.

        Args:
            text: such as ``"refusal-caa > 1.5"`` or ``"joy > 1 off 0 & ~(fear > 2) per token"``.

        Raises:
            CompositionError: the text is none; the message names the column.
        """
        if isinstance(text, When):
            return text
        if not isinstance(text, str):
            raise CompositionError(f"when: got {repr(text)[:40]}; give a text, such as 'refusal-caa > 1.5'")
        reader = TextReader(text, "when")
        found = read_when(reader)
        if reader.here():
            raise reader.error(_follows(reader))
        return found

    def __str__(self) -> str:
        return _said(self.rule) + (" per token" if self.per_token else "")

    def bound(self, load: Callable[[str], SteeringVector]) -> When:
        """The same with the vectors that it reads; itself where it has them already.

        Args:
            load: from a name to its vector.

        Raises:
            SteerError: no vector of that name; the message names the column where there is one.
        """
        if self.vectors:
            return self
        return replace(self, vectors=tuple((name, bound_reading(self.columns, name, load)) for name in self.readings))

    @property
    def data(self) -> dict[str, Any]:
        """The rule as JSON holds it."""
        return {"rule": _data(self.rule), **({"per_token": True} if self.per_token else {})}

    @classmethod
    def from_data(cls, data: Any) -> When:
        """Read a rule as JSON holds it.

        Args:
            data: what `data` gave.

        Raises:
            CompositionError: it is no such rule.
            StrengthError: a number that is not finite.
        """
        if not isinstance(data, Mapping) or "rule" not in data or not {"rule", "per_token"} >= set(data):
            raise CompositionError(f"when: got {repr(data)[:40]}; give an object with rule and perhaps per_token")
        return cls(_rule(data["rule"], 0), data.get("per_token", False))


def bound_reading(columns: Mapping[str, int], name: str, load: Callable[[str], SteeringVector]) -> SteeringVector:
    """The vector of a name in a text.

    Args:
        columns: where the names stand in the text, counted from 1.
        name: the name.
        load: from a name to its vector.

    Raises:
        SteerError: no vector of that name; the message names the column where there is one.
    """
    try:
        return load(name)
    except SteerError as error:
        if name not in columns:
            raise
        raise type(error)(f"steering, column {columns[name]}: {error}") from None


def named_at(reader: TextReader, columns: dict[str, int]) -> str:
    """The name that stands here.

    Args:
        reader: of the text.
        columns: takes where it stands.

    Raises:
        CompositionError: none stands here.
    """
    reader.here()
    at = reader.at
    name = reader.name()
    columns.setdefault(name, at + 1)
    return name


def read_when(reader: TextReader) -> When:
    """The rule that stands here, up to a bracket that closes or the end.

    Args:
        reader: of the text.

    Raises:
        CompositionError: none stands here; the message names the column.
    """
    reader.here()
    start, rules = reader.at, _RuleReader(reader)
    rule = rules.either()
    per_token = bool(reader.take(_PER_TOKEN))
    try:
        return When(rule, per_token, columns=rules.columns)
    except SteerError as error:
        raise reader.error(str(error), start) from None


class _RuleReader:
    """Reads a rule: `|` joins what `&` joins."""

    def __init__(self, reader: TextReader) -> None:
        self._reader, self._count = reader, 0
        self.columns: dict[str, int] = {}

    def either(self, depth: int = 0) -> Predicate:
        rule = self._both(depth)
        while self._reader.here() == "|":
            self._reader.at += 1
            rule = rule | self._both(depth)
        return rule

    def _both(self, depth: int) -> Predicate:
        rule = self._one(depth)
        while self._reader.here() == "&":
            self._reader.at += 1
            rule = rule & self._one(depth)
        return rule

    def _one(self, depth: int) -> Predicate:
        """A comparison, or a rule in brackets or behind a ~."""
        reader = self._reader
        mark = reader.here()
        if mark not in ("~", "("):
            return P(str(self.comparison()))
        if depth == _DEEPEST:
            raise reader.error(f"brackets are deeper than {_DEEPEST}")
        reader.at += 1
        if mark == "~":
            return ~self._one(depth + 1)
        rule = self.either(depth + 1)
        if reader.here() != ")":
            raise reader.error(_follows(reader))
        reader.at += 1
        return rule

    def comparison(self) -> Comparison:
        """A reading, a sign and a number."""
        reader, self._count = self._reader, self._count + 1
        if self._count > _MOST:
            raise reader.error(f"more than {_MOST} comparisons")
        reading = named_at(reader, self.columns)
        reader.here()
        sign = reader.take(_SIGN)
        if not sign:
            raise reader.error(f"got {reader.piece()!r} where > or < stands, as in refusal-caa > 1.5")
        reader.here()
        at, value = reader.at, reader.number(_NUMBER)
        off = reader.number(_NUMBER) if reader.take(_OFF) else None
        try:
            return Comparison(reading, value, sign[0] == ">", off)
        except SteerError as error:
            raise reader.error(str(error), at) from None


def _follows(reader: TextReader) -> str:
    return f"got {reader.piece()!r}; behind a comparison may stand off 0.5, & and | with the next one, ) and per token"


def _over(rule: Predicate, change: Callable[[str], str]) -> Predicate:
    """A rule with every name changed."""
    if rule.operation == "name":
        return P(change(rule.parts[0]))
    return Predicate(rule.operation, tuple(_over(part, change) for part in rule.parts))


def _depth(rule: Predicate) -> int:
    return 0 if rule.operation == "name" else 1 + max(map(_depth, rule.parts))


def _said(rule: Predicate) -> str:
    """A rule as it is read aloud: & joins before |, and brackets stand where the order would be another without."""
    if rule.operation == "name":
        return str(rule.parts[0])
    if rule.operation == "not":
        return f"~({_said(rule.parts[0])})"
    first, second = rule.parts
    in_brackets = ("or",) if rule.operation == "and" else ()
    left = f"({_said(first)})" if first.operation in in_brackets else _said(first)
    right = f"({_said(second)})" if second.operation in (*in_brackets, rule.operation) else _said(second)
    return f"{left} {'&' if rule.operation == 'and' else '|'} {right}"


_JOINED = {"and": "all", "or": "any"}


def _data(rule: Predicate) -> dict[str, Any]:
    """A rule as JSON holds it; what one sign joins from left to right is one list."""
    if rule.operation == "name":
        return Comparison.parse(rule.parts[0]).data
    if rule.operation == "not":
        return {"not": _data(rule.parts[0])}
    key, first = _JOINED[rule.operation], _data(rule.parts[0])
    return {key: [*first.get(key, [first]), _data(rule.parts[1])]}


def _rule(data: Any, depth: int) -> Predicate:
    """A rule of what JSON holds."""
    keys = set(data) if isinstance(data, Mapping) else set()
    if depth > _DEEPEST:
        raise CompositionError(f"when: brackets are deeper than {_DEEPEST}")
    if keys == {"not"}:
        return ~_rule(data["not"], depth + 1)
    for operation, key in _JOINED.items():
        if keys == {key} and isinstance(data[key], list | tuple) and 2 <= len(data[key]) <= _MOST:
            first, *others = (_rule(one, depth + 1) for one in data[key])
            for other in others:
                first = Predicate(operation, (first, other))
            return first
    if keys - {"off"} not in ({"reading", "above"}, {"reading", "below"}):
        raise CompositionError(
            f"when: got {repr(data)[:40]}; give an object with reading and above or below, or one of all, any and not"
        )
    above = "above" in keys
    return P(str(Comparison(data["reading"], data["above" if above else "below"], above, data.get("off"))))
