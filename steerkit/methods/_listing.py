"""What each method says of itself, for tables, without loading it: loading one loads torch, which takes seconds.

What the classes of the shipped files say is kept beside them, in `listing.json`; `python -m docs.generate` writes it,
and a test compares it with the classes. Plug-ins, and files that are not in it, are loaded and asked.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerkit._support.plugins import plugin_names, shipped_names
from steerkit.errors import UnknownNameError

if TYPE_CHECKING:
    from steerkit.methods._base import Method

__all__ = ["LISTING", "MethodFacts", "listed_method", "listed_methods"]

_ROOM = "steerkit.methods"
LISTING = Path(__file__).with_name("listing.json")


@dataclass(frozen=True)
class MethodFacts:
    """What a method's class says, with the settings it has by itself.

    Attributes:
        name, title, paper: what it is called.
        scope: which tokens it writes.
        strength: what strengths count, in a word.
        neutral: the strength at which nothing changes; None where there is none.
        data: what it is fitted on.
        edit: the operation that its vectors name.
        is_gated: whether it reads each prompt and decides by it.
        lists_parts: whether it says what a vector of it consists of.
    """

    name: str
    title: str
    paper: str
    scope: str
    strength: str
    neutral: float | None
    data: str
    edit: str
    is_gated: bool
    lists_parts: bool

    @classmethod
    def of(cls, kind: type[Method]) -> MethodFacts:
        """Ask a class.

        Args:
            kind: a method.
        """
        from steerkit.methods._protocols import Gated, ListsParts

        method = kind.from_settings({})
        return cls(
            kind.name,
            kind.title,
            kind.paper,
            method.default_scope,
            kind.strength_unit,
            kind.neutral,
            str(kind.data),
            method.edit_name,
            isinstance(method, Gated),
            isinstance(method, ListsParts),
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return asdict(self)


def listed_method(name: str) -> MethodFacts:
    """What one method says.

    Args:
        name: the file's name under `steerkit/methods`, or a plug-in's.

    Raises:
        UnknownNameError: nothing answers to that name, or what does cannot be used.
    """
    known = _known()
    if name in known:
        return known[name]
    from steerkit.methods._registry import resolve

    return MethodFacts.of(resolve(name))


def listed_methods() -> tuple[dict[str, MethodFacts], dict[str, str]]:
    """What all methods that can be used say, and what is wrong with the others.

    Returns:
        Name to facts, and name to error.
    """
    found, broken = {}, {}
    for name in sorted({*shipped_names(_ROOM), *plugin_names(_ROOM)}):
        try:
            found[name] = listed_method(name)
        except UnknownNameError as error:
            broken[name] = str(error)
    return found, broken


def _known() -> dict[str, MethodFacts]:
    """The shipped methods that are listed; a plug-in of the same name comes before each."""
    listed = {one["name"]: MethodFacts(**one) for one in json.loads(LISTING.read_text(encoding="utf-8"))}
    usable = shipped_names(_ROOM) - plugin_names(_ROOM)
    return {name: facts for name, facts in listed.items() if name in usable}
