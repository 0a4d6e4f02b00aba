"""Where hooked modules stand in their model: one that is replaced takes its hooks with it, and runs no more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from steerkit.errors import ModelError
from steerkit.network.tap import Tap

__all__ = ["Placement"]


class Placement:
    """The places of hooked modules, compared by identity: the module itself, and all around it up to the model.

    Args:
        model: the transformers model.
        taps: what is hooked in it.

    Raises:
        ModelError: see `check`.
    """

    def __init__(self, model: nn.Module, taps: Iterable[Tap]) -> None:
        links: dict[tuple[int, str], tuple[dict[str, Any], str, nn.Module, str]] = {}
        for tap in taps:
            around, parts = model, tap.name.split(".")
            for depth, part in enumerate(parts, start=1):
                holder = _inside(around)._modules
                module = tap.module if depth == len(parts) else holder.get(part)
                if module is None:
                    raise _replaced(".".join(parts[:depth]), None)
                links[id(holder), part] = holder, part, module, ".".join(parts[:depth])
                around = module
        self._links = tuple(links.values())
        self.check()

    def check(self) -> None:
        """Notice a module that has been replaced, or stands in one that has.

        Raises:
            ModelError: there is one; its hooks are no longer called.
        """
        for holder, part, module, name in self._links:
            found = holder.get(part)
            if found is not module and _inside(found) is not module:
                raise _replaced(name, found)


def _inside(module: Any) -> Any:
    """A module without torch.compile's wrapper, which calls the one inside with its hooks."""
    return getattr(module, "_orig_mod", module)


def _replaced(name: str, found: Any) -> ModelError:
    now = "is gone" if found is None else f"is another module now ({type(found).__name__})"
    return ModelError(
        f"{name} {now}, so what was hooked there does not run any more; merge or unload adapters and replace modules "
        "before the context is made, not inside it"
    )
