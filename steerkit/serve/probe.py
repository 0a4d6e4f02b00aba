"""`Probe`: what is read of a vector's direction at every token of an answer.

    reading = mean over sites of (h . u) / s

with h [d] the activation, u the vector's direction of length 1, and s the spread of tokens at the site, which the
vector's file holds (`steerkit.activations.token_scale`); 1 where it holds none. A token's reading is that of the
position which chose it, one before its own: the state in which the model decided for it. What is written at a site is
seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.monitor.read_directions import directions_of
from steerkit.network.tap import Tap, locate
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Probe", "reading"]


class Probe:
    """A vector's direction, to be read in a model.

    Args:
        model: any decoder-only transformers model.
        vector: whose direction.

    Raises:
        DataError: it has no single direction.
        SteerError: it does not fit the model.
    """

    def __init__(self, model: nn.Module, vector: SteeringVector) -> None:
        vector.check(model)
        directions = directions_of(vector, None)
        taps = locate(model, directions)
        scales = [vector.typical(site) or 1.0 for site in directions]
        self._read = [
            (tap, unit / (scale * len(directions)))
            for tap, unit, scale in zip(taps.values(), directions.values(), scales, strict=True)
        ]

    @contextmanager
    def attached(self, rows: int, values: dict[Probe, Tensor]) -> Iterator[None]:
        """Read in the passes of a `with` block.

        Args:
            rows: of a pass.
            values: where [b] readings at the last column are put.
        """
        found: list[Tensor] = []

        def take(tap: Tap, direction: Tensor, h: Tensor) -> None:
            last = h.reshape(rows, -1, h.shape[-1])[:, -1].float()
            found.append(last @ direction.to(last.device))

        with ExitStack() as stack:
            for tap, direction in self._read:
                stack.callback(_hooked(tap, direction, take).remove)
            yield
        if found:
            values[self] = torch.stack([one.to(found[0].device) for one in found]).sum(dim=0)


def _hooked(tap: Tap, direction: Tensor, take: Any) -> Any:
    # Appended, so that the value is read as it flows on, edits included.
    if tap.side == "input":
        return tap.module.register_forward_pre_hook(
            lambda _module, args, kwargs: take(tap, direction, tap.read(args, kwargs)), with_kwargs=True
        )
    return tap.module.register_forward_hook(
        lambda _module, args, kwargs, output: take(tap, direction, tap.read(args, kwargs, output)), with_kwargs=True
    )


@contextmanager
def reading(probes: Iterable[Probe], rows: int) -> Iterator[dict[Probe, Tensor]]:
    """Read several probes in the passes of a `with` block.

    Args:
        probes: which.
        rows: of a pass.

    Yields:
        Of each probe its readings [b] at the last column, when the block has ended.
    """
    values: dict[Probe, Tensor] = {}
    with ExitStack() as stack:
        for probe in dict.fromkeys(probes):
            stack.enter_context(probe.attached(rows, values))
        yield values
