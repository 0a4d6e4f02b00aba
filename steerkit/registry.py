"""Methods by name: a file of `steerkit/methods`, or an entry point of the group `steerkit.methods`."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from steerkit import methods
from steerkit.errors import VectorFileError, unknown_name
from steerkit.methods._base import Method

if TYPE_CHECKING:
    from steerkit.vector import SteeringVector

__all__ = ["method_names", "method_of", "resolve"]

GROUP = "steerkit.methods"


def method_names() -> list[str]:
    """Names of all methods that can be used: the shipped files and installed plug-ins, sorted."""
    shipped = {entry.name for entry in pkgutil.iter_modules(methods.__path__) if not entry.name.startswith("_")}
    return sorted(shipped | {entry.name for entry in entry_points(group=GROUP)})


def resolve(name: str) -> type[Method]:
    """Find a method's class.

    Args:
        name: the file's name under `steerkit/methods`, or a plug-in's.

    Raises:
        UnknownNameError: nothing answers to that name.
    """
    if name not in method_names():
        raise unknown_name("method", name, method_names())
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            found: type[Method] = entry.load()
            return found
    module = importlib.import_module(f"{methods.__name__}.{name}")
    own = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Method)]
    return next(value for value in own if value.__module__ == module.__name__ and value.name == name)


def method_of(vector: SteeringVector) -> Method:
    """Build the method that a vector was fitted with, settings included.

    Args:
        vector: the vector.

    Raises:
        UnknownNameError: the method is not installed.
        VectorFileError: the method's edit is not the one the vector names.
    """
    method = resolve(vector.method).from_settings(vector.settings)
    if method.edit_name != vector.edit:
        raise VectorFileError(
            f"the vector wants edit {vector.edit!r}, but method {vector.method!r} as set does {method.edit_name!r}"
        )
    return method
