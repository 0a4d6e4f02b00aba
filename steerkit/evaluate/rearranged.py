"""Recorded activations whose rows can be rearranged and fitted again, without a pass of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from steerkit.activations.recording import Activations
from steerkit.errors import FitError
from steerkit.evaluate.refit_results import TAIL, Spread, cosine, direction_at, estimate_of
from steerkit.methods._base import Method
from steerkit.methods._registry import method_of
from steerkit.methods._subject import Subject
from steerkit.network.sites import Site
from steerkit.prompts.likeness import Turns
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["RearrangedRows"]

# Rows [n] and [m] of the pooled activations (positive ones first) that stand for the positive and the negative side.
_Arrangement = tuple[Tensor, Tensor]


class RearrangedRows:
    """Recorded activations whose rows can be rearranged and fitted again, without a pass of the model."""

    def __init__(
        self,
        acts: Activations,
        subject: Subject,
        vector: SteeringVector,
        turns: Turns | None,
    ) -> None:
        self._method, self._vector, self._subject, self._acts = method_of(vector), vector, subject, acts
        self._pooled = {site: acts[site] for site in vector.reads}
        self.positives, self.negatives = (len(side[vector.reads[0]]) for side in (acts.positive, acts.negative))
        self._alike = [_alike(side) for side in turns or (range(self.positives), range(self.negatives))]

    def unchanged(self) -> _Arrangement:
        """Every row in its place."""
        every = torch.arange(self.positives + self.negatives)
        return every[: self.positives], every[self.positives :]

    def shuffled(self, generator: torch.Generator) -> _Arrangement:
        """Half of the pairs with swapped sides (of an odd number one more or one less); unpaired rows permuted."""
        positive, negative = self.unchanged()
        if not self._acts.paired:
            order = torch.randperm(self.positives + self.negatives, generator=generator)
            return order[: self.positives], order[self.positives :]
        extra = int(torch.randint(2, (1,), generator=generator)) if self.positives % 2 else 0
        swapped = torch.zeros(self.positives, dtype=torch.bool)
        swapped[torch.randperm(self.positives, generator=generator)[: self.positives // 2 + extra]] = True
        return torch.where(swapped, negative, positive), torch.where(swapped, positive, negative)

    def halves(self, generator: torch.Generator) -> tuple[_Arrangement, _Arrangement]:
        """Two halves of the items, those that are alike together; of an odd number the second has one more."""
        halves: list[list[Tensor]] = [[], []]
        orders = self._by_side(lambda count: torch.randperm(count, generator=generator))
        for groups, order in zip(self._alike, orders, strict=True):
            parts = order[: len(order) // 2], order[len(order) // 2 :]
            for half, part in zip(halves, parts, strict=True):
                half.append(_rows(groups, part))
        left, right = ((half[0], half[1] + self.positives) for half in halves)
        return left, right

    def resampled(self, generator: torch.Generator) -> _Arrangement:
        """As many items, drawn with replacement; those that are alike are drawn together."""
        orders = self._by_side(lambda count: torch.randint(count, (count,), generator=generator))
        positive, negative = (_rows(groups, order) for groups, order in zip(self._alike, orders, strict=True))
        return positive, negative + self.positives

    def _by_side(self, draw: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """Groups drawn of each side; pairs stay together."""
        positive = draw(len(self._alike[0]))
        return positive, positive if self._acts.paired else draw(len(self._alike[1]))

    def fit(self, arrangement: _Arrangement) -> SteeringVector:
        """The vector that the method makes of rearranged rows.

        Raises:
            FitError: the sides do not differ.
        """
        positive, negative = ({site: rows[chosen] for site, rows in self._pooled.items()} for chosen in arrangement)
        # As `fit` does it: what a method streams, it also gets here.
        streams = {site: self._method.statistics(site) for site in self._vector.reads}
        kept = {site: stream for site, stream in streams.items() if stream is not None}
        if len(kept) == len(streams):
            for site, stream in kept.items():
                stream.update(positive[site], negative[site])
                positive[site], negative[site] = stream.result()
        acts = replace(self._acts, positive=positive, negative=negative, items=arrangement)
        tensors = self._method.fit(acts, self._subject, list(self._vector.reads))
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise FitError(f"{self._method.name}: {name} is not finite on rearranged rows")
        if type(self._method).written is Method.written:  # applied where it is fitted
            return replace(self._vector, tensors=tensors)
        reads = self._vector.reads
        written = tuple(self._method.written(list(reads), tensors, self._subject.decoder))
        return replace(self._vector, tensors=tensors, sites=written, fitted_at=None if written == reads else reads)

    def cosines(self, one: SteeringVector, other: SteeringVector) -> dict[Site, float]:
        """Cosine between two vectors' directions at each site that has one."""
        found = {}
        for site in self._vector.reads:
            directions = [direction_at(self._method, vector, site) for vector in (one, other)]
            if directions[0] is not None and directions[1] is not None:
                found[site] = cosine(directions[0], directions[1])
        return found

    def spread(self, site: Site, again: list[SteeringVector]) -> Spread | None:
        """Cosines to the vector and lengths of directions of drawn items; None where no draw has one here."""
        own = direction_at(self._method, self._vector, site)
        found = [direction for one in again if (direction := direction_at(self._method, one, site)) is not None]
        if own is None or not found:
            return None
        cosines = torch.tensor([cosine(direction, own) for direction in found], dtype=torch.double)
        return Spread(
            cosine=float(cosines.quantile(0.5)),
            cosine_low=float(cosines.quantile(TAIL)),
            length=estimate_of([float(direction.norm()) for direction in found]),
        )


def _alike(turns: Sequence[int]) -> list[list[int]]:
    """Rows of one side that stay together, by the turn of each."""
    groups: dict[int, list[int]] = {}
    for row, turn in enumerate(turns):
        groups.setdefault(turn, []).append(row)
    return list(groups.values())


def _rows(groups: list[list[int]], drawn: Tensor) -> Tensor:
    """The rows of the groups that were drawn, in their order."""
    return torch.tensor([row for number in drawn.tolist() for row in groups[number]], dtype=torch.long)
