"""Which cached blocks a steered request may share: those before its first steered token, and those steered alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerkit.engines.vllm.requests import CARRIED

__all__ = ["steering_keys"]


def steering_keys(extra: Mapping[str, Any] | None, end: int) -> list[tuple[str, str]]:
    """What a block of a request is keyed by besides its tokens.

    Args:
        extra: the request's `extra_args`.
        end: position behind the block's last token.

    Returns:
        One key from the block on that holds the first token that steering makes different; before that, none.

    Example:
        >>> carried = {"steerkit": {"key": "abc", "first": 16}}
        >>> steering_keys(carried, 16), steering_keys(carried, 32)
        ([], [('steering', 'abc')])
    """
    carried = (extra or {}).get(CARRIED)
    if not carried or end <= carried["first"]:
        return []
    return [("steering", carried["key"])]
