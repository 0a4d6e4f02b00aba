"""Things found by name: a file of a package, or an installed entry point; and dataclasses whose fields are settings."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from steerkit.errors import SteerError, UnknownNameError, near_miss, unknown_name

__all__ = ["Configured", "Plugins"]

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Configured:
    """A frozen dataclass with a name, whose fields are its settings.

    A field of type `Literal` is checked when the object is made; a subclass with a `__post_init__` of its own calls
    this one first.

    Class attributes:
        name: what it is called on the command line and in files; the file's name.

    Raises:
        SteerError: a setting that is none of the values its `Literal` allows.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, annotation in _choices(kind).items():
            problem = _wrong_setting(annotation, getattr(self, name))
            if problem:
                raise self._setting_error(f"{self.name}: setting {name} = {getattr(self, name)!r}: {problem}")

    @property
    def settings(self) -> dict[str, Any]:
        """The dataclass fields, as stored in files."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Build it with the settings a file names.

        Args:
            settings: field name to value; a list stands for a tuple.

        Raises:
            UnknownNameError: a setting it does not have.
            SteerError: a value of the wrong type, or none of those allowed.
        """
        known = {entry.name for entry in fields(cls)}
        for name in settings:
            if name not in known:
                raise UnknownNameError(f"{cls.name}: unknown setting {name!r}; {near_miss(name, known)}")
        hints = get_type_hints(cls)
        for name, value in settings.items():
            problem = _wrong_setting(hints[name], value)
            if problem:
                raise cls._setting_error(f"{cls.name}: setting {name} = {value!r}: {problem}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})

    @classmethod
    def _setting_error(cls, message: str) -> SteerError:
        return SteerError(message)


class Plugins(Generic[Kind]):
    """Classes by name: the files of one package of steerkit, and the entry points of a group of the same name.

    Args:
        package: such as ``steerkit.methods``; a file whose name does not start with an underscore holds the class
            whose `name` is the file's.
        kind: what messages call them, such as ``method``.
        base: what they all derive from.
    """

    def __init__(self, package: str, kind: str, base: type[Kind]) -> None:
        self._package, self._kind, self._base = package, kind, base

    def names(self) -> list[str]:
        """All names, sorted."""
        path = importlib.import_module(self._package).__path__
        shipped = {entry.name for entry in pkgutil.iter_modules(path) if not entry.name.startswith("_")}
        return sorted(shipped | {entry.name for entry in _installed(self._package)})

    def resolve(self, name: str) -> type[Kind]:
        """Find a class.

        Args:
            name: the file's name in the package, or an entry point's.

        Raises:
            UnknownNameError: nothing answers to that name.
        """
        names = self.names()
        if name not in names:
            raise unknown_name(self._kind, name, names)
        for entry in _installed(self._package):
            if entry.name == name:
                found: type[Kind] = entry.load()
                return found
        module = importlib.import_module(f"{self._package}.{name}")
        own = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, self._base)]
        return next(
            value for value in own if value.__module__ == module.__name__ and getattr(value, "name", None) == name
        )


def _installed(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group, read again only where a folder of `sys.path` has changed.

    Every steering looks its method up, and reading what is installed takes several milliseconds.
    """
    return _entry_points(group, tuple((folder, _changed(folder)) for folder in sys.path), entry_points)


@functools.lru_cache(maxsize=16)
def _entry_points(
    group: str, _state: tuple[tuple[str, int | None], ...], read: Callable[..., Any]
) -> tuple[EntryPoint, ...]:
    return tuple(read(group=group))


def _changed(folder: str) -> int | None:
    """When something was last put into a folder or taken out; None where there is no such folder."""
    try:
        return Path(folder or ".").stat().st_mtime_ns
    except OSError:
        return None


@functools.cache
def _choices(cls: type) -> dict[str, Any]:
    """The fields of a class whose type is a `Literal`."""
    hints = get_type_hints(cls)
    own = {entry.name: hints[entry.name] for entry in fields(cls)}
    return {name: annotation for name, annotation in own.items() if get_origin(annotation) is Literal}


def _wrong_setting(annotation: Any, value: Any) -> str | None:
    """What is wrong with a setting's value; None where nothing is, or where the annotation is not a simple one."""
    if get_origin(annotation) is Literal:
        allowed = get_args(annotation)
        return (
            None
            if value in allowed and type(value) in map(type, allowed)
            else f"allowed are {', '.join(map(str, allowed))}"
        )
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {bool: isinstance(value, bool), int: number and isinstance(value, int), float: number}
    fits[str] = isinstance(value, str)
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return f"{wanted[annotation]} is wanted" if annotation in fits and not fits[annotation] else None
