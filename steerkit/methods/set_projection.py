"""Set-projection: put every token's coordinate along a trait's direction where the trait's own activations have it.

    r = mean over positive items of h  -  mean over negative items of h,       u = r / |r|
    t = mean over positive items of (h . u)
    h' = h - (h . u) u + strength * t u

Allbert, Wiles, Grankovsky (2024), "Identifying and Manipulating Personality Traits in LLMs Through Activation
Engineering", arXiv 2412.10427, where it is called feature induction; the published strengths are 1.3 to 1.4.

The coordinate is replaced, not shifted: applying the edit twice is applying it once, and it cannot run away over the
layers. Strength 0 takes the coordinate out, as ablation does; no strength leaves the activations as they are, so there
is no neutral one. Negative strengths put the coordinate on the far side of zero.

Where this file departs. The direction is scaled to length 1 (left at length |r| the projection would be off by |r|^2).
Nothing is said in the paper about tokens: here the last prompt token is read and all positions are written. And zero
has no meaning for a coordinate of activations that are not centred: where both sides lie below zero, strengths over 1
lead away from the trait. `origin="other"` therefore counts from the other side's mean n instead, t' = n + strength *
(t - n): 0 is the other side's mean, 1 the trait's, and above 1 always means more of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steerkit.errors import VectorMismatchError
from steerkit.maths import edits
from steerkit.maths.directions import mean_difference, unit
from steerkit.maths.rank_two import RankTwo, rank_two
from steerkit.methods._addition import FittedOnMeans
from steerkit.methods._protocols import Params, Prepared
from steerkit.network.sites import Site
from steerkit.tokens.forward_pass import Tokens

__all__ = ["SetProjection"]


@dataclass(frozen=True)
class SetProjection(FittedOnMeans):
    """Set the coordinate along the mean difference to `strength` times its mean on the trait's side.

    No strength is neutral: 0 removes the coordinate.

    Example:
        >>> import torch
        >>> SetProjection().fit_site(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        {'direction': tensor([2., 0.]), 'trait': tensor(3.), 'other': tensor(1.)}
    """

    name: ClassVar[str] = "set_projection"
    title: ClassVar[str] = "Set-projection (feature induction)"
    paper: ClassVar[str] = "Allbert et al. 2024, arXiv 2412.10427"
    readout: ClassVar[str | None] = "last"
    scope: ClassVar[str] = "all"
    params: ClassVar[Mapping[str, str]] = {"direction": "d", "trait": "", "other": ""}
    default_strength: ClassVar[float | None] = 1.0
    neutral: ClassVar[float | None] = None
    ladder: ClassVar[tuple[float, ...]] = (0.5, 1.0, 1.2, 1.4, 1.7, 2.0)

    origin: Literal["zero", "other"] = "zero"
    """What strength 0 sets the coordinate to: zero, or its mean on the other side."""

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "set_projection"

    def fit_site(self, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
        """The direction, and where both sides lie along it.

        Args:
            positive: [n, d] float32.
            negative: [m, d] float32; n and m may differ.

        Returns:
            ``{"direction": [d], "trait": [], "other": []}``: the mean difference, and the mean coordinate of the
            positive and of the negative side, in activation units.

        Raises:
            FitError: both means are equal.
        """
        direction = mean_difference(positive, negative)
        along = unit(direction)
        trait, other = (torch.dot(side.float().mean(dim=0), along) for side in (positive, negative))
        return {"direction": direction, "trait": trait, "other": other}

    def check(self, site: Site, params: Params) -> None:
        """One direction [d] per site, not zero, and the two coordinates.

        Raises:
            VectorMismatchError: one is missing or of another shape, or the direction has no length.
        """
        super().check(site, params)
        if not bool(params["direction"].any()):
            raise VectorMismatchError(f"{site}: the direction has length 0, so there is no coordinate; fit again")

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The direction at length 1, in float32 at least, and the coordinate that is set."""
        wide = torch.promote_types(dtype, torch.float32)
        trait, other = (params[name].reshape(()).to(device).float() for name in ("trait", "other"))
        target = strength * trait if self.origin == "zero" else other + strength * (trait - other)
        return {"direction": unit(params["direction"].double()).to(wide).to(device), "target": target.to(wide)}

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """`h + (target - h . u) u`."""
        return edits.set_projection(h, prepared["direction"], prepared["target"], is_unit=True)

    def rank_two(self, params: Params) -> RankTwo:
        """The new coordinate as numbers.

        Args:
            params: the tensors of one site.
        """
        trait, other = float(params["trait"]), float(params["other"])
        start = 0.0 if self.origin == "zero" else other
        moves = {("one", "one"): start, ("one", "strength"): trait - start, ("along", "one"): -1.0}
        return rank_two(unit(params["direction"].double()), moves)
