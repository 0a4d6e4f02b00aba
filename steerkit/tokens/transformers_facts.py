"""TODO tokens.transformers_facts."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Call",
    "columns_cached",
    "decoding_codes",
    "first_of_real",
    "generate_code",
    "is_used_recurrent_cache",
    "real_of_diagonal",
]


class Call:
    """What is remembered of one `generate` call."""

    def __init__(self, prompt: Tensor, settings: Any) -> None:
        self.prompt = weakref.ref(prompt)
        # The prompt may be the caller's own tensor, given again; the settings are copied for each call.
        self._settings = None if settings is None else weakref.ref(settings)
        self.prompt_width = prompt.shape[1]
        self.boundary: int | None = None
        self.first: Tensor | None = None
        self.columns = 0
        self.store: dict[Any, Any] = {}
        self.running: Callable[[], Tensor | None] | None = None
        self.text: Tensor | None = None

    @property
    def settings(self) -> Any:
        """The call's generation settings; None where they are unknown or gone."""
        return None if self._settings is None else self._settings()

    @property
    def starts_late(self) -> bool:
        """Whether the call was given only what is new behind a cache."""
        return self.boundary is not None and self.boundary > self.prompt_width

    def keep_text(self, ids: Tensor) -> None:
        """Keep the ids of a static cache's text where compiled code, which sees no frames, can go on with them."""
        width = max(getattr(self.settings, "max_length", None) or 0, ids.shape[1])
        self.text = ids.new_full((ids.shape[0], width), -1)
        self.text[:, : ids.shape[1]] = ids

    def belongs_to(self, settings: Any) -> bool:
        """Whether a pass with these settings is one of this call."""
        return self._settings is None or self._settings() is settings

    def note(self, past: int | Tensor, width: int, keep: Any) -> None:
        """Fix the boundary at the first pass and count the columns that were cached."""
        start = past if isinstance(past, int) else self.columns
        if self.boundary is None:
            candidates = (keep - 1) if isinstance(keep, int) and keep > 0 else 0
            if self.prompt_width == 0:  # inputs_embeds: the first pass is the prompt
                self.boundary = start + width - candidates
            elif self.prompt_width <= max(start, width - candidates if start else 0):
                self.boundary = start + self.prompt_width
            else:
                self.boundary = self.prompt_width
        self.columns = start + width

    def past_prompt(self, past: int | Tensor) -> bool:
        """Whether a pass that starts at `past` lies behind the prompt."""
        return isinstance(past, int) and self.boundary is not None and past >= self.boundary


def generate_code() -> Any:
    """The code object of `generate`, whose frame holds the expanded prompt under the name `input_ids`."""
    from transformers.generation.utils import GenerationMixin

    return inspect.unwrap(GenerationMixin.generate).__code__


def decoding_codes() -> frozenset[Any]:
    """The code objects of the loops that decode, whose frames hold the ids of the whole text."""
    from transformers.generation.utils import GenerationMixin

    loops = (getattr(GenerationMixin, name, None) for name in ("_sample", "_beam_search", "_assisted_decoding"))
    return frozenset(inspect.unwrap(loop).__code__ for loop in loops if loop is not None)


def columns_cached(cache: Any, mask: Any, width: int, call: Call | None, compiling: bool) -> int | Tensor | None:
    """Columns already cached: a number where the host knows it, else the cache's counter; None where nobody knows."""
    if cache is None:
        return 0
    try:
        length = cache.get_seq_length()
    except ValueError:  # caches without attention layers (Mamba) do not count
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return max(mask.shape[1] - width, 0)
        if call is not None:
            return call.columns
        return None if is_used_recurrent_cache(cache) else 0
    if isinstance(length, Tensor):
        if compiling or call is None:
            return length.clone()  # block 0 increments the live counter in place
        if call.boundary is not None:
            return call.columns  # no synchronisation in a decoding step
    return int(length)


def is_used_recurrent_cache(cache: Any) -> bool:
    """Whether a cache has only recurrent layers and has seen tokens."""
    if cache is None:
        return False
    try:
        cache.get_seq_length()
    except ValueError:
        used = getattr(cache, "has_previous_state", False)
        return bool(used() if callable(used) else used)
    return False


def real_of_diagonal(mask: Tensor, past: int | Tensor, width: int, cache: Any, layer: int, batch: int) -> Tensor:
    """[b, t] real tokens from a 4-D mask: a real token may attend to itself, a pad may not."""
    offset = cache.get_mask_sizes(width, layer)[1] if cache is not None else 0
    keys = (torch.arange(width, device=mask.device) + past - offset).clamp(0, mask.shape[-1] - 1)
    own = mask[:, 0].gather(-1, keys[None, :, None].expand(mask.shape[0], -1, 1))[..., 0]
    real = own if own.dtype == torch.bool else own == 0
    return real.expand(batch, -1)


def first_of_real(real: Tensor | None, past: int | Tensor, call: Call | None) -> Tensor | None:
    """[b] first real column, remembered over the chunks of one call where the mask shows only the pass itself."""
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
