"""Sets of layers to try: as the command line writes them, and as a method suggests them."""

from __future__ import annotations

from collections.abc import Sequence

from steerkit.methods._base import Method
from steerkit.network.sites import parse_layers

__all__ = ["default_candidates", "parse_candidates"]


def parse_candidates(text: str, num_layers: int | None) -> list[tuple[int, ...]]:
    """Read sets of layers as the command line writes them.

    Args:
        text: sets parted by commas: ``8`` one block, ``8-12`` each of them on its own (both ends included), ``12+14``
            both together.
        num_layers: of the model; None where that is not known yet.

    Returns:
        The sets, none twice.

    Raises:
        SiteError: it means nothing, or a block does not exist.
    """
    found: list[tuple[int, ...]] = []
    for part in text.replace(" ", "").split(","):
        if "+" in part:
            found.append(tuple(sorted({layer for one in part.split("+") for layer in parse_layers(one, num_layers)})))
        else:
            found += [(layer,) for layer in parse_layers(part, num_layers)]
    return list(dict.fromkeys(found))


def default_candidates(
    method: type[Method], num_layers: int, extra: Sequence[Sequence[int]] = ()
) -> list[tuple[int, ...]]:
    """List the sets of layers worth trying: those given, then those that the method suggests.

    Args:
        method: the method.
        num_layers: of the model.
        extra: more sets of layers, such as a recipe's own.
    """
    return list(dict.fromkeys([*(tuple(sorted(set(layers))) for layers in extra), *method.candidates(num_layers)]))
