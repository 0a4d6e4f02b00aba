"""What transformers keeps to itself of caches and masks: this file alone reads them, and `generate_frames` its frames.

No public interface of transformers says how many columns of a cache are filled, or who runs a model. It can be had:

* A manager of continuous batching that is kept hangs on the model, and one that runs is a thread's target.
* A cache says its length, as a number or as a counter on the device; a Mamba cache says only whether it was used, and
  what is no cache object (RWKV's state, a list of tensors) says nothing.
* Which attention a model was set to is in its configs, under a private name; only `eager` gives attention maps.

When transformers renames one of these, this file changes and no other.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.tokens.decoding import Decoding
from steerkit.tokens.generate_call import GenerateCall

__all__ = [
    "CACHE_ARGUMENTS",
    "batching_managers",
    "cache_argument",
    "cache_left_by",
    "cache_of",
    "cache_slots",
    "can_be_cut",
    "columns_cached",
    "eager_attention",
    "empty_attention_cache",
    "first_of_real",
    "forget_past",
    "is_attention_cache",
    "is_packed",
    "is_static",
    "is_used_cache_without_length",
    "is_used_recurrent_cache",
    "keep_past",
    "mask_of_layers",
    "real_of_diagonal",
]

# What a model's forward calls its cache: most of them from transformers 5.24 on; before that most, and Mamba; RWKV,
# XLNet, Reformer.
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache that a pass was given, by whichever name; None where it was given none.

    Args:
        given: the pass's arguments by name.
    """
    return next((given[name] for name in CACHE_ARGUMENTS if given.get(name) is not None), None)


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its cache.

    Args:
        model: a transformers model, or its body, out of any wrapper: those take anything and name nothing.
    """
    named = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in named), "past_key_values")


def cache_left_by(output: Any) -> Any:
    """The cache that a pass gave, by whichever name; None where it gave none.

    Args:
        output: of a model.
    """
    for name in CACHE_ARGUMENTS:
        found = getattr(output, name, None)
        if found is not None or (name == "cache" and hasattr(output, name)):  # then older names only warn
            return found
    return None


def cache_slots(module: nn.Module) -> set[int]:
    """Which layers of a cache the modules inside a module write.

    Args:
        module: any part of a model.

    Returns:
        Their numbers, counted from 0; nothing where the modules do not say.
    """
    numbers = (getattr(part, "layer_idx", None) for part in module.modules())
    return {number for number in numbers if isinstance(number, int)}


def batching_managers(model: nn.Module) -> tuple[Any, Any]:
    """The managers of `generate_batch` that share the blocks of equal prompt beginnings between requests.

    Args:
        model: the transformers model itself.

    Returns:
        One that runs at present, and the one that is kept for the next call; None where there is none.
    """
    module = sys.modules.get("transformers.generation.continuous_batching.continuous_api")
    kind: Any = getattr(module, "ContinuousBatchingManager", ())
    targets = (getattr(getattr(thread, "_target", None), "__self__", None) for thread in threading.enumerate())
    kept = getattr(model, "_cached_continuous_batching_manager", None)

    def shares(one: Any) -> bool:
        return isinstance(one, kind) and one.model is model and one.continuous_batching_config.allow_block_sharing

    return next(filter(shares, targets), None), kept if shares(kept) else None


def is_packed(given: Mapping[str, Any]) -> bool:
    """Whether a pass's arguments say that several texts share a row.

    Args:
        given: the pass's arguments by name.
    """
    return given.get("cu_seq_lens_q") is not None or given.get("block_table") is not None


def columns_cached(
    cache: Any, mask: Any, width: int, call: GenerateCall | Decoding | None, compiling: bool
) -> int | Tensor | None:
    """How many columns a cache holds before a pass.

    Args:
        cache: the pass's cache.
        mask: its attention mask, from which the length of a cache that does not count follows.
        width: columns in the pass.
        call: the `generate` call, or the loop of the caller's, that it belongs to.
        compiling: whether the pass is being compiled.

    Returns:
        A number where the host knows it, else the cache's counter [] on the device; None where nobody knows.
    """
    if cache is None:
        return 0
    length = _length_of(cache)
    if length is None:
        seen = is_used_cache_without_length(cache)
        # A mask over this pass alone says nothing of what was seen before it.
        if isinstance(mask, Tensor) and mask.dim() == 2 and (mask.shape[1] > width or not seen):
            return max(mask.shape[1] - width, 0)
        if call is not None and not (seen and call.boundary is None):
            return call.columns
        return None if seen else 0
    if isinstance(length, Tensor):
        if compiling or call is None:
            return length.clone()  # block 0 increments the live counter in place
        if call.boundary is not None:
            return call.columns  # no synchronisation in a decoding step
    return int(length)


def is_used_recurrent_cache(cache: Any) -> bool:
    """Whether a cache object has only recurrent layers and has seen tokens.

    Args:
        cache: any cache of transformers, or None.
    """
    return hasattr(cache, "get_seq_length") and is_used_cache_without_length(cache)


def is_used_cache_without_length(cache: Any) -> bool:
    """Whether a cache has seen tokens and does not say how many.

    Args:
        cache: what a pass was given as its cache, or None. What is no cache object was made by an earlier pass.
    """
    if cache is None or _length_of(cache) is not None:
        return False
    used = getattr(cache, "has_previous_state", not hasattr(cache, "get_seq_length"))
    return bool(used() if callable(used) else used)


def _length_of(cache: Any) -> Any:
    """The length a cache says it has, a number or a counter []; None where it does not count.

    A cache asks its first layer. MiniMax keeps what linear attention remembers elsewhere, so that there the first layer
    stays empty for good where it is one of linear attention; then a later one knows.
    """
    if not hasattr(cache, "get_seq_length"):
        return None
    try:
        length = cache.get_seq_length()
    except ValueError:  # without attention layers (Mamba)
        return None
    if isinstance(length, Tensor) or length:
        return length
    layers = getattr(cache, "layers", ())
    return max((layer.get_seq_length() for layer in layers if hasattr(layer, "get_seq_length")), default=0)


def can_be_cut(cache: Any) -> bool:
    """Whether all layers of a cache grow by the tokens fed, and so can be cut back.

    Args:
        cache: any cache of transformers, or None.
    """
    from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        return False
    growing = (DynamicLayer, DynamicSlidingWindowLayer)
    if not cache.layers:
        return getattr(cache, "layer_class_to_replicate", None) in growing
    return all(type(layer) in growing for layer in cache.layers)


def is_attention_cache(cache: Any, *, windows: bool = True) -> bool:
    """Whether a cache is keys and values of every layer and nothing else, so that a copy of it can be gone on from.

    Args:
        cache: what a pass gave back; None is none.
        windows: whether layers may keep the last tokens only.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    plain = (DynamicLayer, DynamicSlidingWindowLayer) if windows else (DynamicLayer,)
    return type(cache) is DynamicCache and all(
        type(layer) in plain and isinstance(layer.keys, Tensor) and isinstance(layer.values, Tensor)
        for layer in cache.layers
    )


def empty_attention_cache() -> Any:
    """A cache that keeps the keys and values of every token, of those layers alone that run."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache()


def is_static(cache: Any) -> bool:
    """Whether a cache has a fixed size, so that `generate` may compile the decoding with it.

    Args:
        cache: any cache of transformers, or None.
    """
    return bool(getattr(cache, "is_compileable", False))


def keep_past(cache: Any) -> list[bool | None]:
    """Make sliding windows keep what they would drop.

    Args:
        cache: one that `can_be_cut`.

    Returns:
        What each layer did before, for `forget_past`.
    """
    before = [getattr(layer, "record_past", None) for layer in cache.layers]
    cache.activate_past_recording()
    return before


def forget_past(cache: Any, before: list[bool | None]) -> None:
    """Undo `keep_past`, and drop what has been kept for it.

    Args:
        cache: the cache.
        before: what `keep_past` gave.
    """
    for layer, recorded in zip(cache.layers, before, strict=False):
        if recorded is False:
            layer.crop(0)
            layer.record_past = False


def mask_of_layers(masks: Mapping[str, Any], model: nn.Module | None) -> tuple[Any, int]:
    """One mask of those that a model keeps by layer type; a 2-D one says the most.

    Args:
        masks: layer type to mask: [b, t], or [b, 1, t, columns].
        model: the transformers model.

    Returns:
        The mask, and a layer that it belongs to; None and 0 where there is none.
    """
    known = {kind: mask for kind, mask in masks.items() if isinstance(mask, Tensor)}
    config: Any = getattr(model, "config", None)
    types = list(getattr(config.get_text_config(), "layer_types", None) or []) if config is not None else []
    ranked = sorted(known, key=lambda kind: (known[kind].dim() != 2, kind != "full_attention"))
    if not ranked:
        return None, 0
    return known[ranked[0]], types.index(ranked[0]) if ranked[0] in types else 0


def real_of_diagonal(mask: Tensor, past: int | Tensor, width: int, cache: Any, layer: int, batch: int) -> Tensor:
    """Which tokens of a pass are real, from a 4-D mask: a real token may attend to itself, a pad may not.

    Args:
        mask: [b or 1, 1, t, columns], True or 0 where a token may attend.
        past: columns before this pass: a number, or a counter [].
        width: columns in it.
        cache: the pass's cache, which may have dropped columns.
        layer: one that the mask belongs to.
        batch: rows.

    Returns:
        [b, t] bool.
    """
    offset = cache.get_mask_sizes(width, layer)[1] if cache is not None else 0
    keys = (torch.arange(width, device=mask.device) + past - offset).clamp(0, mask.shape[-1] - 1)
    own = mask[:, 0].gather(-1, keys[None, :, None].expand(mask.shape[0], -1, 1))[..., 0]
    real = own if own.dtype == torch.bool else own == 0
    return real.expand(batch, -1)


def first_of_real(real: Tensor | None, past: int | Tensor, call: GenerateCall | None) -> Tensor | None:
    """Each row's first real column, remembered over the chunks of one call where the mask shows only the pass itself.

    Args:
        real: [b, t] which tokens of the pass are real; None where it does not say.
        past: columns before this pass: a number, or a counter [].
        call: the `generate` call that it belongs to.

    Returns:
        [b], or None where nothing is known.
    """
    if real is None:
        return call.first if call is not None else None
    leading = real.long().cumsum(dim=1).eq(0).sum(dim=1)  # a row of pads only counts as wide as the pass
    if call is None:
        return leading
    known = call.first
    if known is None:
        call.first = leading
    elif isinstance(past, int) and past > 0:
        call.first = torch.where(known == past, known + leading, known)
    return call.first


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Let a model compute its attention in the way that can give the maps, and set it back afterwards.

    A model that cannot be switched stays as it is; then what it returns says whether it gives maps.

    Args:
        model: the transformers model itself.
    """
    parts = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
    configs = {id(module.config): module.config for module in (model, *parts)}
    configs |= {id(text): text for text in (model.config.get_text_config(),)}
    before = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for config, name in before:  # outermost first: setting one sets those inside it
            config._attn_implementation = name
