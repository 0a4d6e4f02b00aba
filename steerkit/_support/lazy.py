"""Names of a room that load what they need when they are first used, so that a room is cheap to enter."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["lazily"]


def lazily(room: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a room's `__init__`, by PEP 562.

    Args:
        room: the package's full name.
        homes: exported name to the module of the room that holds it.

    Returns:
        A function from a name to what it stands for.

    Raises:
        AttributeError: by that function, for a name that the room does not export.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{room}.{homes[name]}"), name)

    return load
