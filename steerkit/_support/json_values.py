"""Plain data as JSON can hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["jsonable"]


def jsonable(value: Any) -> Any:
    """Plain data with None in the place of numbers that JSON does not have.

    Args:
        value: mappings, lists, tuples and what JSON holds.

    Example:
        >>> jsonable({"mean": math.nan, 3: (1.5, math.inf)})
        {'mean': None, '3': [1.5, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
