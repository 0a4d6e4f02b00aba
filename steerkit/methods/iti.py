"""Inference-Time Intervention: shift the attention heads whose activations tell two sides apart best.

    a probe per head      p(positive | x) = sigmoid(w . x + b),   trained on some items, judged on others
    the k best heads      by the share of those others that it sorts right
    u                     mean of the positive x - mean of the negative x (or w), of length 1
    x' = x + strength * s * u,   s the standard deviation of (x . u) over all items of both sides

with x what one head gives before the output projection. Li, Patel, Viegas, Pfister, Wattenberg (2023), "Inference-Time
Intervention: Eliciting Truthful Answers from a Language Model", arXiv 2306.03341, with k = 48 of 1024 heads and a
strength of 15 on LLaMA-7B.

Where this file departs. The probe is a penalised logistic regression of standardised features, so that it does not
depend on how large a head's activations are (the released code fits activations as they are); heads that sort equally
many items right are told apart by the area under the curve, then by place, where the released code takes the later one.
Items that ask the same stay together in the split. How many heads there should be depends on the model: by default the
published share of them. Shifting all tokens alike is a bias of the output projection, as in the released weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from steerkit.activations import Activations
from steerkit.errors import FitError
from steerkit.maths.directions import coordinates, mean_difference, random_direction, unit
from steerkit.maths.probes import LinearProbe, auc, head_count, linear_probe
from steerkit.methods import AddDirection, PartsTable, Subject
from steerkit.methods._base import whole_and_thirds
from steerkit.network import Decoder, Site
from steerkit.prompts.splitting import drawn

if TYPE_CHECKING:
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["InferenceTimeIntervention"]

_PUBLISHED = 48 / 1024


class _Head(NamedTuple):
    site: Site
    number: int
    probe: LinearProbe
    accuracy: float
    area: float


@dataclass(frozen=True)
class InferenceTimeIntervention(AddDirection):
    """Shift the heads whose probes sort held-out items best. Strength 1 is one standard deviation of each head.

    Strength 0 is the identity; negative strengths steer to the other side. Fit it at all layers, which is the default:
    it chooses where it acts.
    """

    name: ClassVar[str] = "iti"
    title: ClassVar[str] = "Inference-Time Intervention: shifting attention heads"
    paper: ClassVar[str] = "Li et al. 2023, arXiv 2306.03341"
    params: ClassVar[Mapping[str, str]] = {"direction": "d", "accuracy": "a"}
    also: ClassVar[Mapping[str, str]] = {"head_width": "int64"}
    readout: ClassVar[str | None] = "last"
    scope: ClassVar[str] = "response"
    ladder: ClassVar[tuple[float, ...]] = (1.0, 2.0, 5.0, 10.0, 15.0, 20.0)

    heads: int = 0
    """How many heads are shifted, in all blocks together; 0 takes 48 of every 1024, as published, but at least one."""
    along: Literal["mean", "probe"] = "mean"
    """Where to: from the negative to the positive mean, or across the probe's boundary."""
    held_out: float = 0.2
    """Share of the items that judges the probes; the others train them."""
    seed: int = 0
    """Of the draw of those items."""

    def sites(self, decoder: Decoder) -> list[Site]:
        """What the heads of every block give.

        Args:
            decoder: the model's decoder.
        """
        return [Site(layer, "z") for layer in range(decoder.num_layers)]

    @classmethod
    def candidates(cls, num_layers: int) -> list[tuple[int, ...]]:
        """All blocks, and each third of them: the heads of several blocks are ranked together.

        Args:
            num_layers: of the model.
        """
        return whole_and_thirds(num_layers)

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Rank the heads of all sites together by their probes, and give the best ones a shift.

        Args:
            acts: activations of both sides at every site.
            subject: whose heads they are, and whose items.
            sites: where to look.

        Returns:
            ``"<site>/direction"`` [d] and ``"<site>/accuracy"`` [a], of all heads of a site with a shifted one; and
            ``"shared/head_width"`` [].

        Raises:
            FitError: the model has no such number of heads, or nothing tells the sides apart.
        """
        assert acts is not None
        count = self._heads_of(subject, acts, sites)
        wanted = self.heads or max(1, round(_PUBLISHED * count * len(sites)))
        if not 1 <= wanted <= count * len(sites):
            raise FitError(f"iti: heads = {self.heads}; give 1 to {count * len(sites)}, or 0 for the published share")
        judged = self._judging(acts, subject, sites[0])
        found = [head for site in sites for head in self._judge(acts, site, count, judged)]
        best = sorted(found, key=lambda one: (-one.accuracy, -one.area))[:wanted]  # a stable sort: equals as they stand
        width = acts.positive[sites[0]].shape[-1] // count
        tensors = {"shared/head_width": torch.tensor(width, dtype=torch.long)}
        for site in dict.fromkeys(head.site for head in best):
            shifts = torch.zeros(count, width, dtype=torch.float32)
            for head in best:
                if head.site == site:
                    plus, minus = (
                        _by_head(side[site], count)[:, head.number] for side in (acts.positive, acts.negative)
                    )
                    shifts[head.number] = self._shift(plus, minus, head.probe)
            tensors[f"{site}/direction"] = shifts.flatten()
            own = [head.accuracy for head in found if head.site == site]
            tensors[f"{site}/accuracy"] = torch.tensor(own, dtype=torch.float32)
        return tensors

    def _heads_of(self, subject: Subject, acts: Activations, sites: list[Site]) -> int:
        """How many heads stand side by side at each site.

        Raises:
            FitError: the sites are no heads of one number and width.
        """
        count, widths = head_count(subject.decoder.model), {acts.positive[site].shape[-1] for site in sites}
        if len(widths) != 1 or not count or widths.pop() % count or any(site.kind != "z" for site in sites):
            listed = ", ".join(map(str, sites[:3]))
            raise FitError(f"iti: {listed} hold no heads of one width ({count} heads by the config); fit at z")
        return count

    def _judging(self, acts: Activations, subject: Subject, site: Site) -> tuple[Tensor, Tensor]:
        """Which rows of either side judge the probes."""
        data = subject.data
        rows = len(acts.positive[site]), len(acts.negative[site])
        if rows == (len(data.positive), len(data.negative)):
            marks = drawn((data.positive, data.negative), paired=data.paired, share=self.held_out, seed=self.seed)
            return torch.tensor(marks.positive, dtype=torch.bool), torch.tensor(marks.negative, dtype=torch.bool)
        # Rows of other items than the data's, as where a fit is repeated on parts of them.
        every = max(2, round(1 / self.held_out))
        positive, negative = (torch.arange(count) % every == every - 1 for count in rows)
        return positive, negative

    def _judge(self, acts: Activations, site: Site, count: int, judged: tuple[Tensor, Tensor]) -> list[_Head]:
        """The probes of one site's heads, trained on some rows and judged on the others."""
        found = []
        sides = [_by_head(side[site], count) for side in (acts.positive, acts.negative)]
        for index in range(count):
            (plus, minus), (others_plus, others_minus) = (
                [side[:, index][mask if is_judging else ~mask] for side, mask in zip(sides, judged, strict=True)]
                for is_judging in (True, False)
            )
            try:
                probe = linear_probe(others_plus, others_minus)
            except FitError as error:
                raise FitError(f"iti at {site}, head {index}: {error}") from None
            high, low = probe.scores(plus), probe.scores(minus)
            right = int((high > 0).sum()) + int((low <= 0).sum())
            found.append(_Head(site, index, probe, right / (len(high) + len(low)), auc(high, low)))
        return found

    def _shift(self, positive: Tensor, negative: Tensor, probe: LinearProbe) -> Tensor:
        """One standard deviation [head width] along a head's direction, from [n, head width] of both sides."""
        direction = unit(mean_difference(positive, negative) if self.along == "mean" else probe.weight)
        return direction * coordinates(torch.cat([positive, negative]).float(), direction).std(correction=0)

    def written(self, sites: list[Site], tensors: Mapping[str, Tensor], decoder: Decoder) -> list[Site]:
        """The sites with a shifted head.

        Args:
            sites: where it was fitted.
            tensors: what `fit` gave.
            decoder: unused.
        """
        return [site for site in sites if f"{site}/direction" in tensors]

    def control(self, vector: SteeringVector, generator: torch.Generator) -> SteeringVector:
        """As many heads at each site, drawn from all of that site, each along a random direction of the same length.

        Args:
            vector: what this method fitted.
            generator: what draws.
        """
        made = {}
        for site in vector.sites:
            params = vector.params(site)
            shifts = _by_head(params["direction"][None], len(params["accuracy"]))[0]
            placed = torch.zeros_like(shifts)
            order = torch.randperm(len(shifts), generator=generator)
            for place, index in zip(order, shifts.any(dim=-1).nonzero()[:, 0], strict=False):
                placed[place] = random_direction(shifts[index], generator)
            made[f"{site}/direction"] = placed.flatten()
        return replace(vector, tensors={**vector.tensors, **made})

    def table(self, vector: SteeringVector) -> PartsTable:
        """The shifted heads, those that sort best first.

        Args:
            vector: what this method fitted.
        """
        rows = []
        for site in vector.sites:
            params = vector.params(site)
            lengths = _by_head(params["direction"][None], len(params["accuracy"]))[0].norm(dim=-1)
            rows += [
                (site.layer, index, float(accuracy), float(length))
                for index, (accuracy, length) in enumerate(zip(params["accuracy"], lengths, strict=True))
                if length > 0
            ]
        rows.sort(key=lambda one: (-one[2], one[0], one[1]))
        return PartsTable(f"{len(rows)} heads", ("layer", "head", "accuracy", "standard deviation"), rows, "")


def _by_head(rows: Tensor, count: int) -> Tensor:
    """[n, heads, head width] of [n, width]."""
    return rows.reshape(len(rows), count, -1)
