"""What a thread remembers of a text from one forward pass to the next.

A text goes on in one of two ways: inside a `generate` call, or in a cache that the caller hands from pass to pass. What
is kept of it (a gate's decision, where its prompt ends) therefore lives with the call, else with the cache, and is
forgotten with it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any, NamedTuple

from torch import Tensor

from steerkit.errors import ModelError
from steerkit.tokens.generate_call import GenerateCall
from steerkit.tokens.transformers_facts import cache_left_by, is_used_recurrent_cache

__all__ = ["Texts"]


class _Kept(NamedTuple):
    """What is kept with a cache."""

    cache: weakref.ref[Any]
    store: dict[Any, Any]


class Texts:
    """The texts that one model's threads are in the middle of.

    Args:
        local: where each thread keeps its own: `call`, the `generate` call of its latest pass; `calls`, all that are
            alive, by their prompt; `caches`, where the prompt of a cache's text ends; `stores`, what goes with caches.
    """

    def __init__(self, local: threading.local) -> None:
        self._local = local

    @property
    def call(self) -> GenerateCall | None:
        """The `generate` call that this thread's latest pass belongs to."""
        return getattr(self._local, "call", None)

    def call_of(self, prompt: Tensor | None, settings: Any, cache: Any, compiling: bool) -> GenerateCall | None:
        """The `generate` call that a pass belongs to.

        Args:
            prompt: [b, t] of the call on the stack; None where there is none.
            settings: of that call.
            cache: of the pass.
            compiling: whether the pass is being compiled, where no stack can be seen and the latest call goes on.

        Raises:
            ModelError: a new call goes on with a used recurrent cache, which transformers does wrongly.
        """
        last: GenerateCall | None = getattr(self._local, "call", None)
        if compiling:
            return last
        if prompt is None:
            self._local.call = None
            return None
        # One `generate` may run inside another (a logits processor that asks about another text).
        calls: dict[int, GenerateCall] = getattr(self._local, "calls", {})
        for key in [key for key, call in calls.items() if call.prompt() is None]:
            del calls[key]
        self._local.calls = calls
        if id(prompt) not in calls or not calls[id(prompt)].belongs_to(settings):
            if is_used_recurrent_cache(cache):
                raise ModelError(
                    "generate: this model's recurrent cache was filled by an earlier call, and transformers continues "
                    "such caches wrongly; pass the whole conversation again without its cache"
                )
            calls[id(prompt)] = GenerateCall(prompt, settings)
        self._local.call = calls[id(prompt)]
        return calls[id(prompt)]

    def store_of(self, call: GenerateCall | None, cache: Any, past: int | Tensor) -> dict[Any, Any]:
        """What is kept from pass to pass of the text that a pass belongs to.

        Args:
            call: the `generate` call of the pass.
            cache: its cache.
            past: columns before the pass: a number, or a cache's counter [].
        """
        if call is not None:
            return call.store
        stores: dict[int, _Kept] = getattr(self._local, "stores", {})
        if stores:
            self._local.stores = stores = {key: kept for key, kept in stores.items() if kept.cache() is not None}
        if cache is None or (isinstance(past, int) and past == 0):
            return {}
        return stores[id(cache)].store if id(cache) in stores else {}

    def hand_on(self, store: dict[Any, Any], output: Any) -> None:
        """Keep a pass's store with the cache it gave, where no call or cache keeps it yet.

        Args:
            store: what the pass kept.
            output: what the model gave.
        """
        cache = cache_left_by(output)
        call: GenerateCall | None = getattr(self._local, "call", None)
        stores: dict[int, _Kept] = getattr(self._local, "stores", {})
        known = (call is not None and call.store is store) or any(kept.store is store for kept in stores.values())
        if cache is not None and not known:
            self._local.stores = {**stores, id(cache): _Kept(weakref.ref(cache), store)}

    def boundary_of_cache(
        self, cache: Any, past: int | Tensor, width: int, *, keep: Any, use_cache: bool, own_sequence: bool
    ) -> int | None:
        """Where the prompt ends in a pass without a `generate` frame of its own.

        Either guidance's extra passes for the negative prompt inside `generate` (an own sequence with an own cache),
        or a decoding loop that names `logits_to_keep` as `generate` does. Anything else: unknown.

        Args:
            cache: of the pass.
            past: columns before the pass: a number, or a cache's counter [].
            width: columns in the pass.
            keep: the pass's `logits_to_keep`.
            use_cache: whether the pass is asked to make a cache.
            own_sequence: whether the pass is such an extra one.

        Returns:
            The first column after the prompt; None where nobody can know.
        """
        if not isinstance(past, int):
            return None
        known: dict[int, tuple[weakref.ref[Any], int]] = getattr(self._local, "caches", {})
        self._local.caches = known
        for key in [key for key, (ref, _) in known.items() if ref() is None]:
            del known[key]
        if cache is not None and id(cache) in known and past > 0:  # an emptied cache begins a new text
            return known[id(cache)][1]
        if own_sequence:
            if cache is None:
                return width if use_cache else None
            boundary = past if past > 0 else width
        elif cache is not None and isinstance(keep, int) and keep > 0 and (width > 1 or past == 0):
            boundary = past + width - (keep - 1)
        else:
            return None
        with contextlib.suppress(TypeError):  # RWKV's state is a list, which cannot be recognised in the next pass
            known[id(cache)] = (weakref.ref(cache), boundary)
        return boundary
