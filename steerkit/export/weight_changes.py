"""Changes of parameters as functions of their old values; several on one parameter act in order.

What changes every slice of a weight by itself is applied to a few slices at a time, so that a large weight needs little
memory beside its old and its new values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerkit.methods._protocols import WeightUpdate

__all__ = ["PART", "QUANTISED", "Change", "changes_of"]

QUANTISED = (
    "an edit can vanish below its steps; bake the unquantised model and quantise that, or export an adapter (steerkit "
    "export --to peft)"
)
"""Why a quantised model is not baked, and what to do."""
PART = 2**22
"""Numbers that are changed at once."""


@dataclass(frozen=True)
class Change:
    """What becomes of one parameter.

    Args:
        updates: from old values in float32 at least to new ones, the first given applied first.
        separable: a dimension each slice along which they change by itself; None where there is none.
    """

    updates: tuple[Callable[[Tensor | None], Tensor], ...]
    separable: int | None

    def __call__(self, old: Tensor | None) -> Tensor:
        """The new values [...], unrounded.

        Args:
            old: [...] in float32 at least; None where the bias is absent.
        """
        value = old
        for update in self.updates:
            value = update(value)
        assert value is not None
        return value

    @torch.no_grad()
    def rounded(self, old: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The new values [...], computed in float32 and rounded once, in parts where that is the same.

        Args:
            old: [...] as stored; None where the bias is absent.
            dtype: of the new values.
        """
        if old is None or self.separable is None or old.dim() <= self.separable or old.numel() <= PART:
            return self(None if old is None else old.float()).to(dtype)
        new = torch.empty_like(old, dtype=dtype)
        slices = max(1, PART * old.shape[self.separable] // old.numel())
        parts = (torch.split(one, slices, self.separable) for one in (old, new))
        for part, place in zip(*parts, strict=True):
            place.copy_(self(part.float()))
        return new


def changes_of(updates: Sequence[WeightUpdate]) -> dict[str, Change]:
    """Combine updates into one change for each parameter; several on one act in order.

    Args:
        updates: what `exact_updates` gave.
    """
    listed: dict[str, list[WeightUpdate]] = {}
    for update in updates:
        listed.setdefault(update.name, []).append(update)
    return {name: _in_turn(some) for name, some in listed.items()}


def _in_turn(updates: Sequence[WeightUpdate]) -> Change:
    """Several changes of one weight as one."""
    dimensions = {update.separable for update in updates}
    return Change(tuple(update.update for update in updates), dimensions.pop() if len(dimensions) == 1 else None)
