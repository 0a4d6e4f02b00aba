"""Reading a model: which tokens (`readout`), at which sites, as samples (`recording`) or as running sums (`streaming`).

`reading` runs the passes, `moments` holds the sums, `expert_activations` averages what routed experts read.
"""

from __future__ import annotations

from steerkit.activations.moments import Accumulator, Means, NormMedian
from steerkit.activations.reading import forward_body, position_inputs
from steerkit.activations.readout import Readout
from steerkit.activations.recording import Activations, record, record_ids
from steerkit.activations.streaming import stream

__all__ = [
    "Accumulator",
    "Activations",
    "Means",
    "NormMedian",
    "Readout",
    "forward_body",
    "position_inputs",
    "record",
    "record_ids",
    "stream",
]
