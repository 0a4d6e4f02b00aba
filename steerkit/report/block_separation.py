"""How well the method's direction tells held-out items apart, at every block and at the vector's own site."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steerkit.activations.recording import Activations, record
from steerkit.errors import DataError, FitError, SiteError
from steerkit.evaluate.blocks import Separation
from steerkit.fitting.fitting import fit, read
from steerkit.fitting.held_out import apart
from steerkit.monitor.token_heat import direction_of
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.report.evidence_parts import Projections
from steerkit.report.workbench import Workbench

__all__ = ["BlockSeparation"]


class BlockSeparation:
    """Held-out items along directions, read in one pass.

    Args:
        bench: model, vector and items.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    @cached_property
    def recorded(self) -> Activations:
        """Held-out items at every block and at the vector's first site, in one pass."""
        self._bench.step("reading held-out items")
        assert self._bench.own is not None
        return record(
            self._bench.model,
            self._bench.tokenizer,
            self._bench.held_out,
            dict.fromkeys([*self.blocks, self._bench.own[0]]),
            readout=self._bench.vector.readout or "last",
            batch_size=self._bench.plan.batch_size,
        )

    @cached_property
    def blocks(self) -> list[Site]:
        """The vector's kind of site at every block that has it; none where nothing can be fitted there."""
        if self._bench.own is None:
            self._bench.missing["layers"] = f"{self._bench.method.name} has no single direction to project on"
        elif self._bench.method.readout is None:
            self._bench.missing["layers"] = (
                f"{self._bench.method.name} reads no contrast set, so there is nothing to fit per block"
            )
        elif self._bench.train is None:
            self._bench.missing["layers"] = "the items the vector was fitted on are not known here"
        else:
            found: list[Site] = []
            for block in range(self._bench.depth):
                try:
                    found += locate(self._bench.model, [Site(block, self._bench.own[0].kind)])
                except SiteError:
                    continue
            return found
        return []

    def layers(self) -> list[Separation]:
        """The method fitted at every block, and how well that separates held-out items."""
        if not self.blocks:
            return []
        self._bench.step("fitting at every block")
        assert self._bench.train is not None
        common: dict[str, Any] = {"method": self._bench.method, "batch_size": self._bench.plan.batch_size}
        acts = read(
            self._bench.model,
            self._bench.tokenizer,
            self._bench.train,
            sites=self.blocks,
            readout=self._bench.vector.readout,
            **common,
        )
        found = []
        for site in self.blocks:
            try:
                fitted = fit(
                    self._bench.model, self._bench.tokenizer, self._bench.train, sites=[site], acts=acts, **common
                )
                direction = direction_of(fitted)[1]
            except (FitError, DataError):  # nothing to learn at this block
                continue
            found.append(Separation(site.layer, *apart(*self.along(site, direction))))
        return found

    def along(self, site: Site, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Held-out projections on a direction.

        Args:
            site: where the items are read.
            direction: [d] of any length.

        Returns:
            [n] of the positive and [m] of the negative side, in activation units.
        """
        rows = self.recorded[site] @ (direction.float() / torch.linalg.vector_norm(direction.float()))
        return rows[: len(self._bench.held_out.positive)], rows[len(self._bench.held_out.positive) :]

    @cached_property
    def projections(self) -> Projections | None:
        """Held-out items along the vector's own direction."""
        if self._bench.own is None:
            self._bench.missing["projections"] = f"{self._bench.method.name} has no single direction to project on"
            return None
        positive, negative = self.along(*self._bench.own)
        return Projections(
            str(self._bench.own[0]), tuple(positive.tolist()), tuple(negative.tolist()), *apart(positive, negative)
        )
