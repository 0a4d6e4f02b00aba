"""Python's collector of circles, which takes a third of a short command where it comes by as usual."""

from __future__ import annotations

import atexit
import gc

__all__ = ["as_usual", "seldom"]

_USUAL = gc.get_threshold()
_SELDOM = (50_000, *_USUAL[1:])


def seldom() -> None:
    """For a process that begins: hardly collect while libraries are imported, nor look through all of it at its end.

    Imports make hundreds of thousands of objects that stay, and every collection looks at those there are.
    """
    gc.set_threshold(*_SELDOM)
    atexit.register(gc.freeze)  # what the system takes back anyway


def as_usual() -> None:
    """Collect as Python does of itself: for what comes after the imports, whose circles may hold large tensors."""
    gc.set_threshold(*_USUAL)
