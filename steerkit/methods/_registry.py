"""Methods by name: a file of `steerkit/methods`, or an entry point of the group `steerkit.methods`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerkit._support.plugins import Plugins
from steerkit.errors import StrengthError, UnknownNameError, VectorFileError
from steerkit.methods._authoring import class_problem
from steerkit.methods._base import Method
from steerkit.methods._protocols import editor_of

if TYPE_CHECKING:
    from steerkit.vector.steering_vector import SteeringVector

__all__ = [
    "can_write_all",
    "default_strength",
    "example_strength",
    "is_gated",
    "method_names",
    "method_of",
    "registration_problem",
    "resolve",
    "usable_methods",
]

_METHODS: Plugins[Method] = Plugins("steerkit.methods", "method", Method, class_problem)


def method_names() -> list[str]:
    """Names of all methods that can be used: the shipped files and installed plug-ins, sorted."""
    return _METHODS.names()


def resolve(name: str) -> type[Method]:
    """Find a method's class.

    Args:
        name: the file's name under `steerkit/methods`, or a plug-in's.

    Raises:
        UnknownNameError: nothing answers to that name, or what does cannot be used.
    """
    return _METHODS.resolve(name)


def usable_methods() -> tuple[dict[str, type[Method]], dict[str, str]]:
    """All methods that can be used, and what is wrong with the others: one broken file takes no other with it.

    Returns:
        Name to class, and name to error.
    """
    found, broken = {}, {}
    for name in method_names():
        try:
            found[name] = resolve(name)
        except UnknownNameError as error:
            broken[name] = str(error)
    return found, broken


def registration_problem(own: type[Method]) -> str | None:
    """Why vectors of a method could not be applied: they name it, and another class or none answers to the name.

    Args:
        own: the method's class.

    Returns:
        One line; None where its own class answers.
    """
    if own.name not in method_names():
        return (
            f"{own.name}: {own.__name__} is not registered; put it in steerkit/methods/{own.name}.py, or add the "
            f'entry point {own.name} = "{own.__module__}:{own.__name__}" of the group steerkit.methods to your '
            "package and install it"
        )
    other = resolve(own.name)
    if (other.__module__, other.__qualname__) != (own.__module__, own.__qualname__):
        return (
            f"{own.name}: the method of that name is {other.__module__}.{other.__qualname__} and would apply what "
            f"{own.__module__}.{own.__qualname__} fits; give the latter a name of its own"
        )
    return None


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


def is_gated(vector: SteeringVector) -> bool:
    """Whether the vector reads each prompt, at `vector.reads`, and decides by it how it is steered.

    Args:
        vector: the vector.

    Raises:
        UnknownNameError: the method is not installed.
        VectorFileError: the method's edit is not the one the vector names.
        VectorMismatchError: the vector lacks a part.
    """
    return editor_of(method_of(vector), vector) is not None


def can_write_all(vector: SteeringVector) -> bool:
    """Whether scope `all` is among those of the vector's method; so it is where the method is not installed.

    Args:
        vector: the vector.
    """
    try:
        return "all" in resolve(vector.method).scopes
    except UnknownNameError:
        return True


def default_strength(vector: SteeringVector) -> float:
    """The strength where nobody gives one: what the file suggests, else the method's default.

    Args:
        vector: the vector.

    Raises:
        StrengthError: neither names one.
        UnknownNameError: the method is not installed.
        VectorFileError: the method's edit is not the one the vector names.
    """
    if vector.suggested_strength is not None:
        return vector.suggested_strength
    kind = method_of(vector)
    natural, why = kind.natural_strength, "the file suggests no strength and there is none by default"
    if vector.calibration.get("by") == "calibrate":
        natural, why = None, "calibration confirmed no effect on held-out items, so the file suggests no strength"
    if natural is None:
        weak = kind.ladder[len(kind.ladder) // 3]
        raise StrengthError(f"{kind.name}: {why}; give a strength, such as {weak:g} ({kind.strength_unit})")
    return natural


def example_strength(vector: SteeringVector) -> float:
    """A strength to show a vector with: the default one, else a weak one of the method's ladder.

    Args:
        vector: the vector.

    Raises:
        UnknownNameError: the method is not installed.
        VectorFileError: the method's edit is not the one the vector names.
    """
    try:
        return default_strength(vector)
    except StrengthError:
        ladder = resolve(vector.method).ladder
        return ladder[len(ladder) // 3]
