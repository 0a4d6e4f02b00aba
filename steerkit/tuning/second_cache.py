"""The cache of the base blocks: a second one beside the first, which is reordered, cropped and dropped with it.

What base blocks remember of a token is not what finetuned blocks remember of it, although both read the same stream.
Fed from one cache nothing fails and the texts are others. The second cache hangs on the first as an attribute, so that
a deep copy of the first (a prompt that is kept) has one of its own.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from steerkit.errors import ModelError
from steerkit.tokens.transformers_facts import is_used_cache_without_length

__all__ = ["check_recurrent_state", "follow", "second_of"]

_SECOND = "_steerkit_second"
_FOLLOWED = (
    "reorder_cache",
    "crop",
    "batch_repeat_interleave",
    "batch_select_indices",
    "reset",
    "activate_past_recording",
)


def follow(cache: Any) -> None:
    """Give a cache its second one, before anything of a text is in it; one that has it is checked.

    Args:
        cache: a cache of transformers.

    Raises:
        ModelError: the cache was begun, or went on, without the base blocks.
    """
    second = cache.__dict__.get(_SECOND)
    length = _length(cache)
    if second is not None:
        if _length(second) != length:
            raise ModelError(
                f"scaled: the cache holds {length} tokens and the base blocks have read {_length(second)} of them; go "
                "on from a cache only where it was filled, or give an empty one"
            )
        return
    if length or is_used_cache_without_length(cache):
        raise ModelError(
            "scaled: this cache was begun outside of the context, without the base blocks; begin anew in it"
        )
    setattr(cache, _SECOND, copy.deepcopy(cache))
    kind: type = type(cache)
    cache.__class__ = _followed(kind)


def second_of(cache: Any) -> Any:
    """The second cache of one that `follow` has seen.

    Args:
        cache: a cache of transformers.
    """
    return cache.__dict__[_SECOND]


def check_recurrent_state(given: dict[str, Any], names: tuple[str, ...], kind: type) -> None:
    """Refuse a cache that is no cache object, of which no second one can be kept (RWKV's state).

    Args:
        given: a block's arguments by name.
        names: what families call their caches.
        kind: the class of cache objects.

    Raises:
        ModelError: there is such a cache.
    """
    for name in names:
        value = given.get(name)
        if value is not None and not isinstance(value, (kind, bool)):
            raise ModelError(
                f"scaled: {name} is a {type(value).__name__} and no cache of transformers, so the base blocks cannot "
                "keep theirs; generate with use_cache=False"
            )


def _length(cache: Any) -> int:
    """How many tokens a cache holds; 0 where it has layers without length alone."""
    try:
        length = cache.get_seq_length()
    except ValueError:  # without attention layers
        return 0
    return int(length.max() if isinstance(length, torch.Tensor) else length)


@functools.cache
def _followed(kind: type) -> type:
    """A class of caches that does to its second cache whatever is done to it."""

    def followed(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = getattr(kind, name)(self, *args, **kwargs)
            second = self.__dict__.get(_SECOND)
            if second is not None:
                getattr(second, name)(*args, **kwargs)
            return given

        return call

    body: dict[str, Any] = {name: followed(name) for name in _FOLLOWED if hasattr(kind, name)}
    return type(kind.__name__, (kind,), {**body, "__module__": kind.__module__})
