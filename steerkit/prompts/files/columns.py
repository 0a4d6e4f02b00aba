"""What a row has, found by its usual names or by the names one gives (`--columns prompt=goal,positive=good`)."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from steerkit.errors import DataError, near_miss

__all__ = ["CHATS", "LABELS", "PAIRS", "PROMPTS", "RESPONSES", "ROLES", "SYSTEMS", "Columns"]

ROLES = ("prompt", "positive", "negative", "response", "system", "label", "source")
"""What a column can be named for."""
PROMPTS = ("prompt", "instruction", "question", "goal", "query", "request", "text", "sentence")
"""Usual names of a prompt that is text, the first that is there counts."""
CHATS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog")
"""Usual names of a list of messages."""
PAIRS = (
    ("positive", "negative"),
    ("chosen", "rejected"),
    ("answer_matching_behavior", "answer_not_matching_behavior"),
    ("pos", "neg"),
    ("good", "bad"),
)
"""Usual names of both sides."""
RESPONSES = ("response", "output", "answer", "completion")
LABELS = ("label", "labels", "class")
SYSTEMS = ("system", "system_prompt")

_USUAL = (*PROMPTS, *CHATS, *(name for pair in PAIRS for name in pair), *LABELS)


@dataclass(frozen=True)
class Columns:
    """Names of columns that are not the usual ones.

    Attributes:
        named: what a column is for (see `ROLES`) to its name.
    """

    named: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role, name in self.named.items():
            if role not in ROLES:
                raise DataError(f"columns: nothing is called {role!r}; {near_miss(role, ROLES)}")
            if not isinstance(name, str) or not name:
                raise DataError(f"columns: {role} = {name!r}; give the name of a column")

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Columns:
        """Read names as they stand on a command line.

        Args:
            texts: such as ``prompt=goal,positive=good``.

        Raises:
            DataError: a text is not of that form, or names one thing twice.
        """
        named: dict[str, str] = {}
        for text in ",".join(texts).split(","):
            role, equals, name = (part.strip() for part in text.partition("="))
            if not equals or not name:
                raise DataError(f"columns: {text.strip()!r}; give such as prompt=goal,positive=good,negative=bad")
            if role in named:
                raise DataError(f"columns: {role} is named twice, {named[role]!r} and {name!r}")
            named[role] = name
        return cls(named)

    def find(self, keys: Collection[str], role: str, usual: Sequence[str] = ()) -> str | None:
        """The column of a row that is there for something.

        Args:
            keys: all columns.
            role: what it is for; a name that was given decides.
            usual: names to look for otherwise, whatever their case.

        Returns:
            The column's name, or None.

        Raises:
            DataError: a column was named that is not there.
        """
        if role in self.named:
            name = self.named[role]
            if name not in keys:
                raise DataError(f"no column {name!r} for {role}; {near_miss(name, map(str, keys))}")
            return name
        folded = {str(key).strip().casefold(): key for key in reversed(list(keys))}
        return next((folded[name] for name in usual if name in folded), None)

    def sides(self, keys: Collection[str]) -> tuple[str, str] | None:
        """The columns of both sides.

        Args:
            keys: all columns.

        Raises:
            DataError: only one of them was named, or one that is not there.
        """
        given = [role for role in ("positive", "negative") if role in self.named]
        if len(given) == 1:
            raise DataError(f"columns: {given[0]} is named and the other side is not; name both")
        for pair in [("", "")] if given else PAIRS:
            found = [self.find(keys, role, (name,)) for role, name in zip(("positive", "negative"), pair, strict=True)]
            if found[0] is not None and found[1] is not None:
                return found[0], found[1]
        return None

    def are_usual(self, keys: Collection[str]) -> bool:
        """Whether a row or a header has at least one column that is known.

        Args:
            keys: all columns.
        """
        known = {*_USUAL, *(name.strip().casefold() for name in self.named.values())}
        return any(str(key).strip().casefold() in known for key in keys)

    @staticmethod
    def told(keys: Collection[str]) -> str:
        """Which columns there are, with usual names that are close to one of them.

        Args:
            keys: all columns.
        """
        listed = ", ".join(repr(str(key)) for key in keys) or "nothing"
        for key in keys:
            close = difflib.get_close_matches(str(key).strip().casefold(), _USUAL, n=1, cutoff=0.75)
            if close and close[0] not in keys:
                return f"{listed} ({key!r}: did you mean {close[0]!r}?)"
        return listed
