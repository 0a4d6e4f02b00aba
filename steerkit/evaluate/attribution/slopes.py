"""How fast an effect begins at every site, head and neuron of a vector: its slope in the strength, before any sweep.

    slope(site) = mean over items of the sum over written tokens of  v . d score / d h
    score(s)    = score(0) + s * slope + O(s^2)

The slope of a whole vector is the sum over its sites, and that of a site the sum over its heads or neurons. Beside it
stand slopes of the method's own controls (random directions of the same norms): they have mean 0, and the slope counted
in their standard deviation is `z`. For a random direction that is |v| * |mean gradient| / sqrt(d).

A slope says how an effect begins, not where it ends: at larger strengths effects bend, and sites whose slopes are alike
may differ in what they cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steerkit.errors import DataError
from steerkit.evaluate.attribution.gradients import Along, slopes_of_texts
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.intervals import Estimate, interval
from steerkit.evaluate.scorers._base import Differentiable, Scorer
from steerkit.evaluate.scoring import ends, scorer_of
from steerkit.maths.probes import head_count
from steerkit.methods._registry import method_of
from steerkit.network.kernel_share import seen_shares
from steerkit.network.sites import Site

if TYPE_CHECKING:
    from steerkit.evaluate.setup import Setup
    from steerkit.evaluate.trial import Answer
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Attribution", "Part", "Slope", "attribute", "attribute_all", "differentiable"]

IN_PARTS = ("z", "mlp_post")


class Part(NamedTuple):
    """The slope of a part of a site.

    Attributes:
        site: where it is.
        number: which head (of `z`) or neuron (of `mlp_post`), counted from 0.
        slope: mean over items with its 95 % interval.
    """

    site: Site
    number: int
    slope: Estimate


@dataclass(frozen=True, eq=False)
class Slope:
    """The slope of one vector at one site, or at all of its sites together.

    Attributes:
        items: [n] of each item, per unit of strength.
        random: [c] of the controls, means over the items.
        parts: [n, p] of each head or neuron, whose sum is `items`; None where the site is not told in parts.
    """

    items: Tensor
    random: Tensor
    parts: Tensor | None = None

    @cached_property
    def estimate(self) -> Estimate:
        """Mean over the items with its 95 % interval."""
        return interval(self.items, shares=False)

    @property
    def spread(self) -> float:
        """Standard deviation of the controls' slopes about 0; nan without controls."""
        return float(self.random.square().mean().sqrt()) if len(self.random) else math.nan

    @property
    def z(self) -> float:
        """The slope in standard deviations of the controls' slopes; nan without controls."""
        spread = self.spread
        return self.estimate.mean / spread if spread > 0 else math.nan

    def as_row(self) -> dict[str, Any]:
        """Plain data for JSON."""
        low, high = ends(self.estimate)
        row: dict[str, Any] = {"slope": self.estimate.mean, "low": low, "high": high, "items": len(self.items)}
        if len(self.random):
            row |= {"z": self.z if math.isfinite(self.z) else None, "random": self.spread}
        return row


@dataclass(frozen=True, eq=False)
class Attribution:
    """Slopes of one vector.

    Attributes:
        vector: the vector.
        column: what the slopes are of.
        scores: [n] of the items without steering.
        sites: by site.
        seen: of sites at `z` and `mlp_post` the share of the direction that the projection behind them sees.
    """

    vector: SteeringVector
    column: str
    scores: Tensor
    sites: Mapping[Site, Slope]
    seen: Mapping[Site, float] = field(default_factory=dict)

    @cached_property
    def total(self) -> Slope:
        """The slope of the whole vector, all of its sites moving together."""
        listed = list(self.sites.values())
        return Slope(
            torch.stack([one.items for one in listed]).sum(dim=0),
            torch.stack([one.random for one in listed]).sum(dim=0),
        )

    def parts(self, count: int | None = None) -> list[Part]:
        """Heads and neurons, those of the largest slope first, whichever way it points.

        Args:
            count: so many at the most; None lists all.
        """
        means = [(site, one.parts.double().mean(dim=0)) for site, one in self.sites.items() if one.parts is not None]
        listed = [(site, index, mean) for site, own in means for index, mean in enumerate(own.tolist())]
        listed.sort(key=lambda one: -abs(one[2]))
        found = []
        for site, index, _ in listed[:count]:
            parts = self.sites[site].parts
            assert parts is not None
            found.append(Part(site, index, interval(parts[:, index], shares=False)))
        return found

    def as_json(self, parts: int | None = None) -> dict[str, Any]:
        """Plain data: every site, the whole, and the first parts.

        Args:
            parts: how many heads and neurons; None lists all.
        """
        return {
            "column": self.column,
            "unsteered": float(self.scores.mean()),
            "sites": [
                {"site": str(site), **one.as_row(), "seen_share": self.seen.get(site)}
                for site, one in self.sites.items()
            ],
            "total": self.total.as_row(),
            "parts": [
                {
                    "site": str(one.site),
                    "number": one.number,
                    **dict(zip(("slope", "low", "high"), one.slope, strict=True)),
                }
                for one in self.parts(parts)
            ],
        }


def attribute(
    setup: Setup,
    vector: SteeringVector,
    scorer: str | Scorer = "preference_margin",
    *,
    controls: int = 20,
    seed: int = 0,
) -> Attribution:
    """Slopes of a vector's effect at each of its sites, heads and neurons, from one forward and backward pass.

    Args:
        setup: model, tokenizer and held-out items.
        vector: any vector that does nothing at some strength and is not gated.
        scorer: whose first column is the effect; it has to be `Differentiable`, as `preference_margin` is.
        controls: random directions beside it.
        seed: fixes them.

    Returns:
        The slopes.

    Raises:
        DataError: the vector has no slope, the scorer no gradient, or the items lack what it needs.
        ModelError: no gradient goes through the model, such as a quantised one.
    """
    (found,) = attribute_all(setup, [vector], scorer, controls=controls, seed=seed)
    directions = {site: method_of(vector).direction(vector.params(site)) for site in vector.sites}
    seen = seen_shares(setup.decoder, {site: one for site, one in directions.items() if one is not None})
    return replace(found, seen=seen)


def attribute_all(
    setup: Setup,
    vectors: Sequence[SteeringVector],
    scorer: str | Scorer = "preference_margin",
    *,
    controls: int = 0,
    seed: int = 0,
    in_parts: bool = True,
) -> list[Attribution]:
    """The same for several vectors, which share the passes.

    Args:
        setup: model, tokenizer and held-out items.
        vectors: fitted on the same rendering of prompts and answers.
        scorer: see `attribute`.
        controls: random directions beside each.
        seed: fixes them.
        in_parts: whether heads and neurons are told.

    Returns:
        The slopes of each, in their order.

    Raises:
        DataError: see `attribute`; or there is no vector.
        ModelError: see `attribute`.
    """
    if not vectors:
        raise DataError("attribution: got no vector; give at least one")
    chosen, setup = differentiable(scorer), setup.trial(vectors[0]).setup
    column = next(iter(scorer_of(scorer).columns))
    beside = [[random_like(vector, seed=seed + 1 + number) for number in range(controls)] for vector in vectors]

    def score(answer: Answer) -> Tensor:
        return chosen.of_text(answer)[None]

    scores, alongs = slopes_of_texts(
        setup,
        chosen.texts(setup),
        score,
        vectors,
        others=beside,
        parts=lambda site: in_parts and site.kind in IN_PARTS,
    )
    heads = head_count(setup.decoder.model)
    return [
        Attribution(
            vector,
            column,
            chosen.of_items(scores[0]),
            {site: _slope(chosen, one, heads if site.kind == "z" else 0) for site, one in found.items()},
        )
        for vector, found in zip(vectors, alongs, strict=True)
    ]


def differentiable(scorer: str | Scorer) -> Differentiable:
    """A scorer through which gradients go.

    Args:
        scorer: a name, or a scorer with its settings.

    Raises:
        DataError: none go through it.
        UnknownNameError: no scorer of that name.
    """
    found = scorer_of(scorer)
    if not isinstance(found, Differentiable):
        raise DataError(
            f"{found.name}: no gradient goes through this scorer; take preference_margin, or a scorer of yours with "
            "`texts`, `of_text` and `of_items`"
        )
    return found


def _slope(scorer: Differentiable, found: Along, heads: int) -> Slope:
    """The items' slopes from those of their texts; the parts of a site with heads are these."""
    parts = None
    if found.parts is not None:
        parts = scorer.of_items(found.parts[0].T).T  # [n, d]
        if heads and parts.shape[1] % heads == 0:
            parts = parts.reshape(len(parts), heads, -1).sum(dim=-1)
    random = scorer.of_items(found.others[:, 0]).mean(dim=-1)
    return Slope(scorer.of_items(found.own[0]), random, parts)
