"""Things found by name: a file of a package, or an installed entry point; and dataclasses whose fields are settings."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from steerkit.errors import SteerError, UnknownNameError, near_miss, unknown_name

__all__ = ["Configured", "Plugins", "plugin_names", "shipped_names"]

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Configured:
    """A frozen dataclass with a name, whose fields are its settings.

    Fields of the types `Literal`, `bool`, `int`, `float`, `str`, or of several of them joined by ``|``, are checked
    when the object is made; a subclass with a `__post_init__` of its own calls this one first.

    Class attributes:
        name: what it is called on the command line and in files; the file's name.

    Raises:
        SteerError: a setting of the wrong type, or none of the values its `Literal` allows.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for name, annotation in self._setting_types().items():
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
        hints = cls._setting_types()
        for name, value in settings.items():
            problem = _wrong_setting(hints[name], value)
            if problem:
                raise cls._setting_error(f"{cls.name}: setting {name} = {value!r}: {problem}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})

    @classmethod
    def _setting_types(cls) -> dict[str, Any]:
        """The types of the fields.

        Raises:
            SteerError: one names what its file does not import.
        """
        try:
            kind: Any = cls
            return _field_types(kind)
        except NameError as error:
            raise cls._setting_error(f"{cls.__name__}: the type of a setting cannot be read ({error})") from None

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
        problem: what is wrong with a class, in half a sentence; None where nothing is.
    """

    def __init__(
        self, package: str, kind: str, base: type[Kind], problem: Callable[[type[Kind]], str | None] = lambda _: None
    ) -> None:
        self._package, self._kind, self._base, self._problem = package, kind, base, problem

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(shipped_names(self._package) | plugin_names(self._package))

    def resolve(self, name: str) -> type[Kind]:
        """Find a class.

        Args:
            name: the file's name in the package, or an entry point's.

        Raises:
            UnknownNameError: nothing answers to that name, or what does cannot be used.
        """
        names = self.names()
        if name not in names:
            raise unknown_name(self._kind, name, names)
        entry = next((entry for entry in _installed(self._package) if entry.name == name), None)
        home = entry.value if entry else f"{self._package}.{name}"
        try:
            found = entry.load() if entry else self._in_file(name)
        except Exception as error:  # whatever a file of somebody else's does; the others have to go on working
            raise self._broken(name, home, f"{type(error).__name__}: {error}") from error
        if not isinstance(found, type) or not issubclass(found, self._base):
            base = f"{self._base.__module__.partition('._')[0]}.{self._base.__name__}"
            raise self._broken(name, home, f"{_shown(found)} does not derive from {base}; name a class that does")
        own = getattr(found, "name", None)
        if own != name:
            given = "has no `name`" if own is None else f"has name = {own!r}"
            raise self._broken(name, home, f"{found.__name__} {given}; write name: ClassVar[str] = {name!r}")
        problem = self._problem(found)
        if problem:
            raise self._broken(name, home, f"{found.__name__} {problem}")
        return found

    def _in_file(self, name: str) -> Any:
        """The class of a file of the package: the one of its name, else whatever it defines of the kind."""
        module = importlib.import_module(f"{self._package}.{name}")
        own = [value for value in vars(module).values() if isinstance(value, type)]
        own = [value for value in own if value.__module__ == module.__name__]
        of_kind = [value for value in own if issubclass(value, self._base)]
        named = [value for value in of_kind if getattr(value, "name", None) == name]
        return next(iter([*named, *of_kind, *own]), module)

    def _broken(self, name: str, home: str, reason: str) -> UnknownNameError:
        return UnknownNameError(f"{self._kind} {name!r} ({home}) cannot be used: {' '.join(reason.split())}")


def shipped_names(package: str) -> set[str]:
    """Names of the files of a package that hold something to be found by name; none of them is loaded.

    Args:
        package: such as ``steerkit.methods``.
    """
    path = importlib.import_module(package).__path__
    return {entry.name for entry in pkgutil.iter_modules(path) if not entry.name.startswith("_")}


def plugin_names(group: str) -> set[str]:
    """Names of the installed entry points of a group; none of them is loaded.

    Args:
        group: such as ``steerkit.methods``.
    """
    return {entry.name for entry in _installed(group)}


def _shown(found: Any) -> str:
    """What something is called in a message."""
    return getattr(found, "__name__", None) or type(found).__name__


def _installed(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group, read again only where a folder of `sys.path` has changed.

    Every steering looks its method up, and reading what is installed takes several milliseconds.
    """
    return _entry_points(group, tuple((folder, _changed(folder)) for folder in sys.path), entry_points)


@functools.lru_cache(maxsize=16)
def _entry_points(
    group: str, _state: tuple[tuple[str, int | None], ...], read: Callable[..., Any]
) -> tuple[EntryPoint, ...]:
    """The entry points of a group, read anew only where `_state`, what is installed and when, has changed."""
    return tuple(read(group=group))


def _changed(folder: str) -> int | None:
    """When something was last put into a folder or taken out; None where there is no such folder."""
    try:
        return Path(folder or ".").stat().st_mtime_ns
    except OSError:
        return None


@functools.cache
def _field_types(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, and of nothing else: other annotations may name what only mypy imports."""
    found: dict[str, Any] = {}
    for entry in fields(cls):
        home = next(base for base in cls.__mro__ if entry.name in inspect.get_annotations(base))
        here = vars(sys.modules[home.__module__])
        try:
            found |= get_type_hints(SimpleNamespace(__annotations__={entry.name: entry.type}), here, dict(vars(home)))
        except NameError as error:
            raise NameError(
                f"{entry.name}: {entry.type}, but {error}; import it in {home.__module__}, and not under TYPE_CHECKING"
            ) from None
    return found


def _wrong_setting(annotation: Any, value: Any) -> str | None:
    """What is wrong with a setting's value; None where nothing is, or where the annotation is not a simple one."""
    if get_origin(annotation) in (Union, UnionType):
        problems = [_wrong_setting(one, value) for one in get_args(annotation)]
        return None if None in problems else " or ".join(filter(None, problems))
    if get_origin(annotation) is Literal:
        allowed = get_args(annotation)
        return (
            None
            if value in allowed and type(value) in map(type, allowed)
            else f"allowed are {', '.join(map(str, allowed))}"
        )
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {bool: isinstance(value, bool), int: number and isinstance(value, int), float: number}
    fits |= {str: isinstance(value, str), type(None): value is None}
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "nothing"}
    return f"{wanted[annotation]} is wanted" if annotation in fits and not fits[annotation] else None
