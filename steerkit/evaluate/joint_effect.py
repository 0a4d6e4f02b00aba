"""What several vectors change together, beside the sum of what each changes alone.

    change(v)    = score under v - score of the unsteered model, item by item
    interaction  = change(all together) - sum of change(v) over the vectors, item by item

An interaction whose interval leaves out 0 says that together the vectors do something else than the sum. On the log
scale (perplexity) changes are ratios, their sum is a product, and an interaction of 1 is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerkit.evaluate.intervals import Estimate, interval
from steerkit.evaluate.scorers._base import Column, Scorer, Weighted
from steerkit.evaluate.scoring import counted, has_gaps
from steerkit.evaluate.setup import Setup
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Effect", "effects_of"]


@dataclass(frozen=True)
class Effect:
    """What the vectors do to one figure of one set of items, alone and together.

    Attributes:
        data: name of the items.
        name: name of the figure.
        column: what the figure is.
        alone: per vector the change it makes by itself.
        joint: the change they make together.
        added: the sum of the changes that they make alone.
        interaction: joint minus added, paired by item.
        orthogonal: the change that the orthogonalised vectors make together; None unless asked for.
        items: items scored in every trial; the others count nowhere.
        failures: the others.
    """

    data: str
    name: str
    column: Column
    alone: Mapping[str, Estimate]
    joint: Estimate
    added: Estimate
    interaction: Estimate
    orthogonal: Estimate | None
    items: int
    failures: int = 0

    @property
    def interferes(self) -> bool:
        """Whether the interaction's interval excludes the value that means no interaction."""
        none = 1.0 if self.column.scale == "log" else 0.0
        return not self.interaction.low <= none <= self.interaction.high

    def as_row(self) -> dict[str, Any]:
        """Plain data for JSON; an end of an interval that is not finite is null."""
        return {
            "data": self.data,
            "score": self.name,
            "unit": self.column.unit,
            "alone": {name: _plain(estimate) for name, estimate in self.alone.items()},
            "sum": _plain(self.added),
            "joint": _plain(self.joint),
            "interaction": _plain(self.interaction),
            "interferes": self.interferes,
            "orthogonal": None if self.orthogonal is None else _plain(self.orthogonal),
            "items": self.items,
            "failures": self.failures,
        }


def effects_of(
    data: str,
    setup: Setup,
    vectors: Mapping[str, SteeringVector],
    bent: Sequence[SteeringVector] | None,
    scorer: Scorer,
    seed: int,
) -> list[Effect]:
    """Measure one scorer's figures on one set of items: each vector alone, and all of them together."""
    alone = {name: scorer.score(setup.trial(vector)) for name, vector in vectors.items()}
    joint = scorer.score(setup.trial(list(vectors.values())))
    orthogonal = None if bent is None else scorer.score(setup.trial(list(bent)))
    every = [*alone.values(), joint, *([] if orthogonal is None else [orthogonal])]
    needed = not scorer.against_baseline or any(map(has_gaps, every))
    baseline = scorer.score(setup.baseline) if needed else joint
    found = []
    for name, column in scorer.columns.items():

        def change(scores: Mapping[str, Tensor | Weighted], name: str = name) -> Tensor:
            return _change(scorer, name, scores[name], baseline[name])

        changes = {one: change(scores) for one, scores in alone.items()}
        together = change(joint)
        added = torch.stack(list(changes.values())).sum(dim=0)
        after = None if orthogonal is None else change(orthogonal)
        # An item counts everywhere or nowhere, or the parts would not add up.
        lost = torch.isnan(added + together + (0 if after is None else after))
        scored = joint[name]
        weights = scored.weights if isinstance(scored, Weighted) else None

        def estimate(values: Tensor, lost: Tensor = lost, weights: Tensor | None = weights) -> Estimate:
            return interval(values.masked_fill(lost, math.nan), weights=weights, seed=seed)

        shown = Estimate.exp if column.scale == "log" else _same
        found.append(
            Effect(
                data=data,
                name=name,
                column=column,
                alone={one: shown(estimate(values)) for one, values in changes.items()},
                joint=shown(estimate(together)),
                added=shown(estimate(added)),
                interaction=shown(estimate(together - added)),
                orthogonal=None if after is None else shown(estimate(after)),
                items=int((~lost).sum()),
                failures=int(lost.sum()),
            )
        )
    return found


def _same(estimate: Estimate) -> Estimate:
    return estimate


def _change(scorer: Scorer, name: str, after: Tensor | Weighted, before: Tensor | Weighted) -> Tensor:
    """Per item the change to the unsteered model [n]; a scorer that compares by itself gives it already."""
    values, _ = counted(scorer, name, after, before)
    if scorer.against_baseline:
        return values - scorer.columns[name].neutral
    return values - (before.values if isinstance(before, Weighted) else before).detach().cpu().double()


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {name: end if math.isfinite(end) else None for name, end in estimate._asdict().items()}
