"""Angular Steering: send every token's part in one plane to one angle; the adaptive form spares tokens below b1 = 0.

    b1, b2 as in Selective Steering:  the most typical difference of means, and a principal axis of all of them
    standard:   h' = h - P h + r (cos b1 + sin b2),    r = |P h|,    P = b1 b1' + b2 b2'
    adaptive:   the same where h.b1 > threshold (0), and h elsewhere

at every norm's output. Strength is the angle in degrees, counted from b1 (the positive side) towards b2.

Vu, Nguyen (2025), "Angular Steering: Behavior Control via Rotation in Activation Space", arXiv 2510.26243; called SAS
and AAS in Dang, Ngo (2026), arXiv 2601.19375.

Norms stay: the part in the plane had the length r and has it again, and the rest is not touched. The later paper's
Proposition 1 says that standard Angular Steering violates this; it does not hold (its proof shows only that angle 0 is
not the identity). The real difference to Selective Steering is that the angle is absolute: tokens that differ in their
polar angle alone become one, differences between tokens are lost, the edit is not linear and cannot be undone, and no
angle leaves the model as it is. Hence there is no neutral strength, and no weight form.

Where this file departs. The released code takes the sign of b2 as the decomposition gives it; here b2 points to where
turning the negative side by a positive angle brings it towards the positive one, at all sites together (as in
`selective`), so that an angle means the same in every fit.
Its adaptive form multiplies by a mask, which lets values that are not finite leak into the tokens it spares; here they
are selected. It also acts at the norms behind attention and MLP, where a model has such (`norms="all"`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.activations.moments import Means
from steerkit.activations.recording import Activations
from steerkit.maths import edits
from steerkit.maths.directions import side_projections
from steerkit.maths.rank_two import RankTwo, rank_two
from steerkit.methods._plane import RotateInPlane
from steerkit.methods._protocols import Params, Prepared
from steerkit.methods._subject import Subject
from steerkit.network.sites import Site
from steerkit.tokens.forward_pass import Tokens

__all__ = ["AngularSteering"]


@dataclass(frozen=True)
class AngularSteering(RotateInPlane):
    """Turn all norms' outputs to one angle of a plane.

    No angle is the identity, so `neutral` is None: 0 puts every token on b1, and 360 the same. A larger angle is not a
    larger edit either; `sweep` looks at every angle, where `calibrate` stops at the first that costs too much.
    """

    name: ClassVar[str] = "angular"
    title: ClassVar[str] = "Angular Steering"
    paper: ClassVar[str] = "Vu and Nguyen 2025, arXiv 2510.26243"
    neutral: ClassVar[float | None] = None
    ladder: ClassVar[tuple[float, ...]] = tuple(float(degrees) for degrees in range(30, 361, 30))

    adaptive: bool = False
    """Turn only tokens that lie further along b1 than `threshold`."""
    threshold: float = 0.0
    """Where along b1 the adaptive form begins, in activation units; of no effect in the standard form."""

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "rotate_to_above" if self.adaptive else "rotate_to"

    def statistics(self, site: Site) -> Means:
        """Two running means; no activation is kept.

        Args:
            site: where they accumulate.
        """
        return Means()

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Find the plane from all sites.

        Args:
            acts: activations of both sides at every site.
            subject: unused.
            sites: where to look, and to act.

        Returns:
            ``"shared/direction"`` and ``"shared/second"`` [d], and ``"<site>/projections"`` [2] of each site.

        Raises:
            FitError: the sites span no plane.
        """
        assert acts is not None
        plane = self._fit_plane(acts, sites)
        found = side_projections(acts.positive, acts.negative, plane["shared/direction"], rule="class_means")
        plane = self._oriented(plane, acts, sites)
        return {**plane, **{f"{site}/projections": torch.tensor(found[site], dtype=torch.float32) for site in sites}}

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The plane and the point of the unit circle to turn to."""
        basis = edits.plane(params["direction"], params["second"], dtype).to(device)
        return {"basis": basis, "ray": edits.heading(strength, basis)}

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """Turn every token to the angle, or those beyond the threshold."""
        return edits.aim(h, prepared["basis"], prepared["ray"], self.threshold if self.adaptive else None)

    def rank_two(self, params: Params) -> RankTwo:
        """The turn as numbers: both axes of the ray, less what lies along them.

        Args:
            params: the tensors of one site.
        """
        first, second = edits.plane(params["direction"], params["second"], torch.float32)
        moves = {("length", "one"): 1.0, ("length", "less"): 1.0, ("along", "one"): -1.0}
        turns = {("length", "sine"): 1.0, ("across", "one"): -1.0}
        return rank_two(first, moves, second, turns, self.threshold if self.adaptive else -math.inf)
