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

import torch
from torch import Tensor, nn

from steerkit.activations.reading import attach_reader
from steerkit.monitor.read_directions import directions_of
from steerkit.network.sites import Site
from steerkit.network.tap import locate
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
        self._taps = dict(zip(directions, locate(model, directions).values(), strict=True))
        self._directions = {
            site: direction / ((vector.typical(site) or 1.0) * len(directions))
            for site, direction in directions.items()
        }

    @contextmanager
    def attached(self, rows: int, values: dict[Probe, Tensor]) -> Iterator[None]:
        """Read in the passes of a `with` block.

        Args:
            rows: of a pass.
            values: where [b] readings at the last column are put.
        """
        found: list[Tensor] = []

        def take(site: Site, h: Tensor) -> None:
            last = h.reshape(rows, -1, h.shape[-1])[:, -1].float()
            found.append(last @ self._directions[site].to(last.device))

        with ExitStack() as stack:
            for site, tap in self._taps.items():
                stack.callback(attach_reader(tap, site, take).remove)
            yield
        if found:
            values[self] = torch.stack([one.to(found[0].device) for one in found]).sum(dim=0)


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
