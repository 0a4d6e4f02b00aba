"""`Hold`: a strength that brings a reading to a target.

    hold        name at number within number to number

`optimism-caa hold(optimism-caa at 2 within 0 to 3)`: at every block that optimism-caa is written at, and for every
token, the strength between 0 and 3 that brings the reading there to 2 standard deviations of neutral texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from steerkit._support.text_reader import TextReader, check_name, name_text, number_text
from steerkit.errors import CompositionError, SteerError
from steerkit.vector.frozen import float32_number
from steerkit.vector.when import bound_reading, named_at

if TYPE_CHECKING:
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Hold", "read_hold"]

_AT, _WITHIN, _TO = (re.compile(rf"\s*{word}\b") for word in ("at", "within", "to"))


@dataclass(frozen=True)
class Hold:
    """A strength that is found anew for each token, so that a reading comes to a target.

    Attributes:
        reading: the vector that is read, wherever the steered vector is written.
        at: the target, in standard deviations of neutral texts.
        within: the smallest strength and the largest, in the unit of the steered vector.
        vector: the vector that is read; None in a text that has not been bound to any.
        columns: where the name stands in the text it was read from, counted from 1; no part of it.

    Raises:
        CompositionError: a name that is none, or limits that are not in order.
        StrengthError: a number that is not finite.

    Example:
        >>> print(Hold.parse("optimism-caa at 2.0 within 0 to 3"))
        optimism-caa at 2 within 0 to 3
    """

    reading: str
    at: float
    within: tuple[float, float]
    vector: SteeringVector | None = None
    columns: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_name(self.reading)
        object.__setattr__(self, "at", float32_number("at", self.at))
        try:
            low, high = self.within
        except (TypeError, ValueError):
            raise CompositionError(
                f"within: got {repr(self.within)[:40]}; give the smallest strength and the largest"
            ) from None
        low, high = float32_number("within", low), float32_number("within", high)
        if not low < high:
            raise CompositionError(f"within {number_text(low)} to {number_text(high)} ends before it begins")
        object.__setattr__(self, "within", (low, high))

    @property
    def most(self) -> float:
        """The limit that is further from 0."""
        return max(self.within, key=abs)

    @classmethod
    def parse(cls, text: str | Hold) -> Hold:
        """Read it from its text.

        Args:
            text: such as ``"optimism-caa at 2 within 0 to 3"``.

        Raises:
            CompositionError: the text is none; the message names the column.
        """
        if isinstance(text, Hold):
            return text
        if not isinstance(text, str):
            raise CompositionError(f"hold: got {repr(text)[:40]}; give a text, such as 'joy at 2 within 0 to 3'")
        reader = TextReader(text, "hold")
        found = read_hold(reader)
        if reader.here():
            raise reader.error(f"got {reader.piece()!r} behind the limits")
        return found

    def __str__(self) -> str:
        low, high = map(number_text, self.within)
        return f"{name_text(self.reading)} at {number_text(self.at)} within {low} to {high}"

    def bound(self, load: Callable[[str], SteeringVector]) -> Hold:
        """The same with the vector that is read; itself where it has it already.

        Args:
            load: from a name to its vector.

        Raises:
            SteerError: no vector of that name; the message names the column where there is one.
        """
        if self.vector is not None:
            return self
        return replace(self, vector=bound_reading(self.columns, self.reading, load))

    @property
    def data(self) -> dict[str, Any]:
        """The same as JSON holds it."""
        return {"reading": self.reading, "at": self.at, "within": list(self.within)}

    @classmethod
    def from_data(cls, data: Any) -> Hold:
        """Read it as JSON holds it.

        Args:
            data: what `data` gave.

        Raises:
            CompositionError: it is another form.
            StrengthError: a number that is not finite.
        """
        if not isinstance(data, Mapping) or set(data) != {"reading", "at", "within"}:
            raise CompositionError(f"hold: got {repr(data)[:40]}; give an object with reading, at and within")
        if not isinstance(data["within"], list | tuple):
            raise CompositionError(
                f"within: got {repr(data['within'])[:40]}; give the smallest strength and the largest"
            )
        return cls(data["reading"], data["at"], tuple(data["within"]))


def read_hold(reader: TextReader) -> Hold:
    """What stands here, up to a bracket that closes or the end.

    Args:
        reader: of the text.

    Raises:
        CompositionError: none stands here; the message names the column.
    """
    reader.here()
    start, columns = reader.at, dict[str, int]()
    reading, numbers = named_at(reader, columns), []
    for word, example in ((_AT, "at 2"), (_WITHIN, "within 0 to 3"), (_TO, "to 3")):
        reader.here()
        if not reader.take(word):
            raise reader.error(f"got {reader.piece()!r} where {example} stands, as in joy at 2 within 0 to 3")
        numbers.append(reader.number(f"a number stands, as in {example}"))
    try:
        return Hold(reading, numbers[0], (numbers[1], numbers[2]), columns=columns)
    except SteerError as error:
        raise reader.error(str(error), start) from None
