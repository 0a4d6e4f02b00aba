"""One `generate` call of transformers over its forward passes: where its prompt ends, and how far it has come."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["GenerateCall"]


class GenerateCall:
    """What is remembered of one `generate` call.

    Args:
        prompt: [b, t] the call's prompt, repeated for beams and returned sequences; a weak reference is kept.
        settings: the call's generation settings; a weak reference is kept.

    Attributes:
        prompt_width: columns of the prompt that was given, pads included.
        boundary: the first column after the prompt; None before the first pass.
        first: [b] column of each row's first real token, where only the chunks of a prompt show it.
        columns: how many columns are cached.
        store: what goes from pass to pass of this call's text.
        running: gives the ids [b, t] of the text so far, or None.
        edge: [] `boundary` on the device, for compiled code, which would be made anew for each number; see `keep_edge`.
        text: [b, max_length] ids of a static cache's text, for compiled code; see `keep_text`.
    """

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
        self.edge: Tensor | None = None
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
        """Keep the ids of a static cache's text where compiled code, which sees no frames, can go on with them.

        Args:
            ids: [b, t] the text so far.
        """
        width = max(getattr(self.settings, "max_length", None) or 0, ids.shape[1])
        self.text = ids.new_full((ids.shape[0], width), -1)
        self.text[:, : ids.shape[1]] = ids

    def keep_edge(self, device: torch.device) -> None:
        """Keep where the prompt ends where compiled code can go on with it.

        Args:
            device: of the model's passes.
        """
        if self.edge is None and self.boundary is not None:
            self.edge = torch.tensor(self.boundary, dtype=torch.long, device=device)

    def belongs_to(self, settings: Any) -> bool:
        """Whether a pass with these settings is one of this call.

        Args:
            settings: generation settings.
        """
        return self._settings is None or self._settings() is settings

    def note(self, past: int | Tensor, width: int, keep: Any) -> None:
        """Fix the boundary at the first pass and count the columns that were cached.

        Args:
            past: columns before this pass: a number, or a cache's counter [].
            width: columns in it.
            keep: the pass's `logits_to_keep`; assisted decoding asks for one more than it has candidates.
        """
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
        """Whether a pass lies behind the prompt.

        Args:
            past: columns before the pass: a number, or a cache's counter [].
        """
        return isinstance(past, int) and self.boundary is not None and past >= self.boundary
