"""JSON-like values that nobody can change, and back."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from steerkit.errors import StrengthError

__all__ = ["finite_number", "float32_number", "frozen", "json_like", "thawed", "whole_number"]

MAX_NESTING = 32
_LARGEST = 3.4028234663852886e38  # of float32


def finite_number(value: Any) -> float:
    """The value as a float.

    Args:
        value: anything.

    Raises:
        ValueError: it is no finite number.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, got {value!r}")
    return number


def float32_number(name: str, value: Any) -> float:
    """A finite number that float32 can hold, in which strengths and readings are computed.

    Args:
        name: what it is.
        value: what was given.

    Raises:
        StrengthError: it is none.
    """
    try:
        number = finite_number(value)
    except ValueError:
        number = math.inf
    if abs(number) > _LARGEST:
        raise StrengthError(f"{name}: got {repr(value)[:40]}; give a finite number")
    return number + 0.0  # -0 is 0


def whole_number(value: Any) -> int:
    """The value as an int.

    Args:
        value: anything.

    Raises:
        ValueError: it is no whole number of at most 64 bits.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or abs(value) >= 2**64:
        raise ValueError(f"must be a whole number of at most 64 bits, got {value!r}")
    return int(value)


def frozen(value: Any, depth: int = 0) -> Any:
    """A JSON-like value that nobody can change.

    Args:
        value: None, text, bools, finite numbers, and lists and mappings of such.
        depth: how deep it stands already.

    Raises:
        ValueError: something else, or too much nesting.
    """
    if depth > MAX_NESTING:
        raise ValueError(f"is nested more than {MAX_NESTING} deep")
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"keys must be text, got {wrong[0]!r}")
        return MappingProxyType({key: frozen(value[key], depth + 1) for key in sorted(value)})
    if isinstance(value, list | tuple):
        return tuple(frozen(entry, depth + 1) for entry in value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Real):
        return whole_number(value) if isinstance(value, numbers.Integral) else finite_number(value)
    raise ValueError(f"must hold text, finite numbers, lists and mappings only, got {value!r}")


def thawed(value: Any) -> Any:
    """The value with plain dicts in place of read-only ones.

    Args:
        value: what `frozen` gave.
    """
    if isinstance(value, Mapping):
        return {key: thawed(entry) for key, entry in value.items()}
    return tuple(map(thawed, value)) if isinstance(value, tuple) else value


def json_like(value: Any) -> Any:
    """The value with dicts and lists, as JSON gives it back.

    Args:
        value: what `frozen` gave.
    """
    if isinstance(value, Mapping):
        return {str(key): json_like(entry) for key, entry in value.items()}
    return [json_like(entry) for entry in value] if isinstance(value, tuple) else value
