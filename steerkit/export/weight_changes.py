"""Changes of parameters as functions of their old values; several on one parameter act in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from steerkit.methods._protocols import WeightUpdate

__all__ = ["Change", "changes_of"]

Change = Callable[[Tensor | None], Tensor]


def changes_of(updates: Sequence[WeightUpdate]) -> dict[str, Change]:
    """Combine updates into one change for each parameter; several on one act in order.

    Args:
        updates: what `exact_updates` gave.
    """
    listed: dict[str, list[Change]] = {}
    for update in updates:
        listed.setdefault(update.name, []).append(update.update)
    return {name: _in_turn(some) for name, some in listed.items()}


def _in_turn(changes: Sequence[Change]) -> Change:
    """Several changes of one weight as one, the first given applied first."""

    def change(old: Tensor | None) -> Tensor:
        value = old
        for one in changes:
            value = one(value)
        assert value is not None
        return value

    return change
