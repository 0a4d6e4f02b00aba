"""How well the method's direction tells held-out items apart, at every block and at the vector's own site."""

from __future__ import annotations

from functools import cached_property

import torch

from steerkit.activations.recording import record
from steerkit.errors import DataError
from steerkit.evaluate.blocks import Separation, separation_by_block
from steerkit.evaluate.fits import Fits
from steerkit.fitting.held_out import apart
from steerkit.report.evidence_parts import Projections
from steerkit.report.workbench import LEFT_OUT, Workbench

__all__ = ["BlockSeparation"]


class BlockSeparation:
    """Held-out items along directions.

    Args:
        bench: model, vector and items.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    def layers(self) -> list[Separation]:
        """The method fitted at every block, and how well that separates held-out items; none, where it cannot be."""
        bench = self._bench
        reason = None if bench.plan.refitted else LEFT_OUT
        if bench.own is None:
            reason = f"{bench.method.name} has no single direction to project on"
        elif bench.method.readout is None:
            reason = f"{bench.method.name} reads no contrast set, so there is nothing to fit per block"
        elif bench.train is None:
            reason = "the items the vector was fitted on are not known here"
        if reason is None:
            assert bench.train is not None and bench.own is not None
            bench.step("fitting at every block")
            fits = Fits(
                bench.setup,
                bench.train,
                bench.method,
                (),
                readout=bench.vector.readout,
                kinds=[bench.own[0].kind],
            )
            try:
                return separation_by_block(fits, bench.held_out, range(bench.depth))
            except DataError as error:
                reason = str(error)
        bench.missing["layers"] = reason
        return []

    @cached_property
    def projections(self) -> Projections | None:
        """Held-out items along the vector's own direction."""
        bench = self._bench
        if bench.own is None:
            bench.missing["projections"] = f"{bench.method.name} has no single direction to project on"
            return None
        bench.step("reading held-out items")
        site, direction = bench.own
        acts = record(
            bench.model,
            bench.tokenizer,
            bench.held_out,
            [site],
            readout=bench.vector.readout or "last",
            batch_size=bench.plan.batch_size,
        )
        along = direction.float() / torch.linalg.vector_norm(direction.float())
        positive, negative = acts.positive[site] @ along, acts.negative[site] @ along
        return Projections(str(site), tuple(positive.tolist()), tuple(negative.tolist()), *apart(positive, negative))
