"""`Probe`: what is read along a vector at every token of an answer: the number that a monitor shows, and gates read.

A token's reading is that of the position which chose it, one before its own: the state in which the model decided for
it. What is written at a site is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from steerkit.activations.reading import attach_reader
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.steering.readings import VectorReading
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Probe", "reading"]


class Probe:
    """A vector, to be read in a model.

    Args:
        model: any decoder-only transformers model.
        name: of the vector.
        vector: along which is read. Where its file holds no scale of neutral texts, these are read off the model now.
        tokenizer: the model's.

    Raises:
        DataError: it has no direction.
        SteerError: it does not fit the model.
    """

    def __init__(self, model: nn.Module, name: str, vector: SteeringVector, tokenizer: Any) -> None:
        self._reading = VectorReading(model, name, vector, tokenizer)
        self._reading.scale("response_mean")  # now, and not in a pass
        self._taps = locate(model, self._reading.sites)

    @contextmanager
    def attached(self, rows: int, values: dict[Probe, Tensor]) -> Iterator[None]:
        """Read in the passes of a `with` block.

        Args:
            rows: of a pass.
            values: where [b] readings at the last column are put.
        """
        found: dict[Site, Tensor] = {}

        def take(site: Site, h: Tensor) -> None:
            found[site] = h.reshape(rows, -1, h.shape[-1])[:, -1].float()

        with ExitStack() as stack:
            for site, tap in self._taps.items():
                stack.callback(attach_reader(tap, site, take).remove)
            yield
        if found:
            device = next(iter(found.values())).device
            values[self] = self._reading.of_answers({site: one.to(device) for site, one in found.items()})


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
