"""Selective Steering: rotate by an angle, at the sites where the two sides lie on opposite sides of zero.

    d_k = unit(mean of the positive rows - mean of the negative rows)        at every site k
    b1  = the d_k most like all of them,     b2 = first principal axis of all d_k, made orthogonal to b1
    h'  = h - P h + V h,      P = b1 b1' + b2 b2',      V = cos P + sin (b2 b1' - b1 b2')

at the sites where the mean projections of the two sides on b1 have opposite signs. Strength is the angle in degrees.

Dang, Ngo (2026), "Selective Steering: Norm-Preserving Control Through Discriminative Layer Selection",
arXiv 2601.19375.

What sets it apart is not that norms stay: they do under standard Angular Steering too (method `angular`), and the
paper's Proposition 1, which says otherwise, does not hold. Its proof shows that angle 0 is not the identity there, from
which nothing follows for norms. The real difference is that the angle here is relative. The edit is one linear
isometry: angle 0 is the identity, every edit can be undone, distances between tokens stay, and it can be folded into
the weights that read the norm. Angular Steering sends all tokens to one ray, which is neither linear nor invertible.

Where this file departs. The sign of b2 is arbitrary in the released code, so that angles of two fits cannot be
compared; here a positive angle takes the negative side towards the positive one, over the selected sites together, and
a negative angle back. The paper selects by the means of the raw rows (its eq. 9), the released code by the means of
rows scaled to length 1 and by whole blocks; both are settings, and the code's are the default (the paper's are
`rule="class_means"` and `whole_blocks=False`). Norms behind attention and MLP, which the released code takes too, are
`norms="all"`. Where nothing is selected, the released code steers nothing and says nothing; here that is an error. A
site where the sides differ by rounding only counts as one where they do not differ. The released code multiplies by two
dense matrices in the model's precision, with a basis rounded to it, and so changes norms by up to 1.6 % in bfloat16;
here it is a rank-2 update in float32 with a float32 basis. Whole turns change no bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from steerkit.activations.moments import Means
from steerkit.activations.recording import Activations
from steerkit.errors import FitError, SiteError
from steerkit.maths import edits
from steerkit.maths.directions import discriminative_sites, side_projections
from steerkit.maths.rank_two import RankTwo, rank_two
from steerkit.methods._plane import RotateInPlane
from steerkit.methods._protocols import Params, Prepared, WeightUpdate
from steerkit.methods._subject import Subject
from steerkit.network.decoder import Decoder, find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import anatomies
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["SelectiveSteering"]


@dataclass(frozen=True)
class SelectiveSteering(RotateInPlane):
    """Rotate the norms' outputs by an angle where the two sides lie on opposite sides of zero.

    Fit it at many sites (`layers="8-24"`, or none for all): the plane is shared, and the method itself chooses where it
    acts. The fitted vector's `sites` are the selected ones, its `fitted_at` all that were looked at. One site alone
    gives no plane; one block does where its attention and its MLP read norms of their own.
    """

    name: ClassVar[str] = "selective"
    title: ClassVar[str] = "Selective Steering"
    paper: ClassVar[str] = "Dang and Ngo 2026, arXiv 2601.19375"
    neutral: ClassVar[float | None] = 0.0
    ladder: ClassVar[tuple[float, ...]] = (15.0, 30.0, 45.0, 60.0, 90.0, 120.0, 150.0, 180.0)

    rule: Literal["unit_samples", "class_means"] = "unit_samples"
    """How sites are selected: by rows scaled to length 1 (released code) or by the raw means (paper, eq. 9)."""
    whole_blocks: bool = True
    """Select the sites of a block together or not at all (released code)."""

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "rotate_by"

    def statistics(self, site: Site) -> Means | None:
        """Two running means where means are all that the rule needs; else the samples are kept.

        Args:
            site: where they accumulate.
        """
        return Means() if self.rule == "class_means" else None

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Find the plane from all sites and select where to act.

        Args:
            acts: activations of both sides at every site.
            subject: unused.
            sites: where to look.

        Returns:
            ``"shared/direction"`` and ``"shared/second"`` [d], and ``"<site>/projections"`` [2] of each selected site.

        Raises:
            FitError: the sites span no plane, or none is selected.
        """
        assert acts is not None
        plane = self._fit_plane(acts, sites)
        positive, negative = ({site: side[site] for site in sites} for side in (acts.positive, acts.negative))
        direction = plane["shared/direction"]
        chosen = discriminative_sites(positive, negative, direction, rule=self.rule, whole_blocks=self.whole_blocks)
        if not chosen:
            blocks = ", whole blocks" if self.whole_blocks else ""
            raise FitError(
                f"selective: at none of {len(sites)} sites do the two sides lie on opposite sides of zero (rule "
                f"{self.rule}{blocks}); try other layers, whole_blocks=False or the other rule"
            )
        found = side_projections(positive, negative, direction, rule=self.rule)
        plane = self._oriented(plane, acts, chosen)
        return {**plane, **{f"{site}/projections": torch.tensor(found[site], dtype=torch.float32) for site in chosen}}

    def written(self, sites: list[Site], tensors: Mapping[str, Tensor], decoder: Decoder) -> list[Site]:
        """The selected sites.

        Args:
            sites: where it was fitted.
            tensors: what `fit` gave.
            decoder: unused.
        """
        return [site for site in sites if f"{site}/projections" in tensors]

    def is_neutral(self, strength: float) -> bool:
        """Whole turns change no bit."""
        return math.fmod(strength, 360.0) == 0

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The plane, and what `turn` needs to know of the angle."""
        basis = edits.plane(params["direction"], params["second"], dtype).to(device)
        less, sine = edits.turning(basis, strength)
        return {"basis": basis, "less": less, "sine": sine}

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """Rotate every token."""
        return edits.turn(h, prepared["basis"], prepared["less"], prepared["sine"])

    def rank_two(self, params: Params) -> RankTwo:
        """The rotation as numbers.

        Args:
            params: the tensors of one site.
        """
        first, second = edits.plane(params["direction"], params["second"], torch.float32)
        moves = {("along", "less"): 1.0, ("across", "sine"): -1.0}
        return rank_two(first, moves, second, {("along", "sine"): 1.0, ("across", "less"): 1.0})

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """The linear layers that read a norm's output take over its rotation; biases stay.

        Raises:
            SiteError: something else reads the tensor too: a residual stream behind a post-norm, a router of experts,
                an adapter, or a module that is not linear.
        """
        if self.is_neutral(strength):
            return []
        decoder = find_decoder(model)
        found = anatomies(decoder, {site.layer for site in vector.sites})
        updates = []
        for site in vector.sites:
            if site.kind not in ("attn_in", "mlp_in", "block_in"):
                raise SiteError(
                    f"{site}: no linear layer alone reads what is rotated here, so no weight can; use hooks"
                )
            params = vector.params(site)
            basis = edits.plane(params["direction"], params["second"], torch.float64)
            less, sine = edits.turning(basis, strength)
            change = less * basis + sine * torch.stack([basis[1], -basis[0]])
            for call in found[site.layer].readers(site.kind):
                name = f"{decoder.path}.{site.layer}.{call.name}"
                rotated = _rotated(call.module, name, basis, change)
                updates.append(WeightUpdate(f"{name}.weight", rotated, int(_inputs_first(call.module))))
        return updates


def _inputs_first(module: nn.Module) -> bool:
    """Whether a linear layer holds its weight transposed, as GPT-2's do."""
    return type(module).__name__ == "Conv1D"


def _rotated(module: nn.Module, name: str, basis: Tensor, change: Tensor) -> Callable[[Tensor | None], Tensor]:
    """The rank-2 change of a weight that makes the layer rotate what it reads.

    Raises:
        SiteError: the module is no plain linear layer.
    """
    inputs_first = _inputs_first(module)
    if not inputs_first and not isinstance(module, nn.Linear):
        what = "an adapter around a linear layer; merge it first" if hasattr(module, "base_layer") else "not linear"
        raise SiteError(f"{name} is {type(module).__name__}, {what}; or steer with hooks")

    def update(old: Tensor | None) -> Tensor:
        assert old is not None
        plane, added = basis.to(old), change.to(old)
        return old + plane.T @ (added @ old) if inputs_first else old + (old @ added.T) @ plane

    return update
