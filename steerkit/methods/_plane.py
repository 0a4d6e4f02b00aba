"""What the methods share that rotate activations in one plane: where they act, how the plane is found, its control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steerkit.activations.recording import Activations
from steerkit.errors import FitError, SiteError, VectorMismatchError
from steerkit.maths.directions import coordinates, mean_difference, orthonormalise, steering_plane
from steerkit.methods._base import Method
from steerkit.methods._protocols import Params
from steerkit.network.anatomy import Anatomy
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.network.tap import anatomies
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["RotateInPlane"]


@dataclass(frozen=True)
class RotateInPlane(Method):
    """Base of the methods that rotate in one plane shared by all sites. Strength is an angle in degrees.

    The plane is `shared/direction` (b1) and `shared/second` (b2), float32 and orthonormal; each site that is written
    has `projections`: where the positive and the negative side lie along b1, on average.
    """

    readout: ClassVar[str | None] = "last"
    scope: ClassVar[str] = "all"
    params: ClassVar[Mapping[str, str]] = {"direction": "d", "second": "d"}
    also: ClassVar[Mapping[str, str]] = {"projections": "k"}
    strength_unit: ClassVar[str] = "degrees"

    norms: Literal["before", "all"] = "before"
    """Which norms' outputs are read and written where no site is given: those before attention and MLP, or all of them,
    also the norms behind them (Gemma-2 has both; the released code takes all). A model that has the latter only gives
    those."""

    def sites(self, decoder: Decoder) -> list[Site]:
        """The outputs of the norms of every block, as in the papers.

        Args:
            decoder: the model's decoder.

        Raises:
            SiteError: the model has no such norms.
        """
        return self.sites_at(decoder, range(decoder.num_layers))

    def sites_at(self, decoder: Decoder, layers: Sequence[int]) -> list[Site]:
        """The outputs of the norms of some blocks: attn_in and mlp_in, or block_in where one norm feeds both.

        Args:
            decoder: the model's decoder.
            layers: blocks counted from 0.

        Raises:
            SiteError: the blocks have no such norms.
        """
        found = anatomies(decoder, set(layers))
        chosen = [Site(layer, kind) for layer in layers for kind in _norm_outputs(found[layer], self.norms)]
        if not chosen:
            owner = type(decoder.model).__name__
            raise SiteError(
                f"{self.name}: the blocks of {owner} have no norms before or behind their parts; give sites"
            )
        return chosen

    @classmethod
    def candidates(cls, num_layers: int) -> list[tuple[int, ...]]:
        """All blocks, and bands of a half and a third of them: one block alone hardly spans a plane.

        Args:
            num_layers: of the model.
        """
        bands = [range(num_layers)]
        for share in (2, 3):
            width = max(2, num_layers // share)
            bands += [range(start, start + width) for start in range(width // 2, num_layers - width + 1, width // 2)]
        return list(dict.fromkeys(tuple(band) for band in bands))

    def check(self, site: Site, params: Params) -> None:
        """Two axes that span a plane.

        Raises:
            VectorMismatchError: they do not.
        """
        super().check(site, params)
        first, second = params["direction"], params["second"]
        cosine = torch.cosine_similarity(first.double(), second.double(), dim=0, eps=1e-300)
        if not float(first.norm()) * float(second.norm()) > 0 or not abs(float(cosine)) < 0.99:
            raise VectorMismatchError(
                f"{site}: {self.name}: the two axes lie on one line, so there is no plane; fit again"
            )

    def direction(self, params: Params) -> Tensor | None:
        """b1, at sites that are written and where the positive side lies further along it; elsewhere none."""
        projections = params.get("projections")
        if projections is None or not float(projections[0]) > float(projections[1]):
            return None
        return params["direction"]

    def control(self, vector: SteeringVector, generator: torch.Generator) -> SteeringVector:
        """The same sites and angles in a random plane.

        Args:
            vector: what this method fitted.
            generator: what draws, on the CPU.
        """
        width = vector.tensors["shared/direction"].shape[0]
        first, second = orthonormalise(torch.randn(2, width, generator=generator, dtype=torch.float32))
        return replace(vector, tensors={**vector.tensors, "shared/direction": first, "shared/second": second})

    def _fit_plane(self, acts: Activations, sites: Sequence[Site]) -> dict[str, Tensor]:
        """The shared plane, b2 with the sign that `steering_plane` gives it."""
        found = [self._difference(acts.positive[site], acts.negative[site]) for site in sites]
        known = [site for site, difference in zip(sites, found, strict=True) if bool(difference.any())]
        if not known:
            raise FitError(
                f"{self.name}: at none of {len(sites)} sites do the two sides differ, so there is no direction"
            )
        if len(known) == 1:
            raise FitError(
                f"{self.name}: only {known[0]} gives a direction, and one direction is no plane; give more layers"
            )
        if len({len(difference) for difference in found}) > 1:
            raise FitError(
                f"{self.name}: one plane is shared by all sites, but they are not all as wide; give one kind"
            )
        candidates = torch.stack(found)
        try:
            first, second = steering_plane(candidates)
        except FitError as error:
            raise FitError(f"{self.name}: {error}") from None
        across = candidates - coordinates(candidates, first)[:, None] * first
        if not bool((across.norm(dim=-1) > 1e-6 * candidates.norm(dim=-1)).any()):
            raise FitError(
                f"{self.name}: the directions of all {len(known)} sites lie on one line, so they span no plane; give "
                "other layers"
            )
        return {"shared/direction": first, "shared/second": second}

    def _oriented(self, plane: dict[str, Tensor], acts: Activations, sites: Sequence[Site]) -> dict[str, Tensor]:
        """The same plane, b2 turned so that a positive angle takes the negative side towards the positive one.

        In the plane, the sine of the angle from a site's negative mean to its positive one has the sign of their cross
        product. Summed over the sites that are written, each weighted by how far its means lie in the plane.
        """
        first, second = plane["shared/direction"].double(), plane["shared/second"].double()
        turn = 0.0
        for site in sites:
            plus, minus = (side[site].double().mean(dim=0) for side in (acts.positive, acts.negative))
            cross = float((minus @ first) * (plus @ second) - (minus @ second) * (plus @ first))
            turn += cross / max(float(plus.norm() * minus.norm()), 1e-300)
        return {**plane, "shared/second": -plane["shared/second"] if turn < 0 else plane["shared/second"]}

    def _difference(self, positive: Tensor, negative: Tensor) -> Tensor:
        """The difference of means [d], or zeros where both sides read the same."""
        try:
            return mean_difference(positive, negative)
        except FitError:  # such as the first norm, where every prompt ends in the same token
            return torch.zeros(positive.shape[-1], dtype=torch.float32)


def _norm_outputs(anatomy: Anatomy, norms: str) -> list[str]:
    """The kinds of site of one block that are a norm's output, in the order in which they come."""
    before: list[str] = [kind for kind in ("attn_in", "mlp_in", "block_in") if anatomy.canonical(kind) == kind]
    if norms == "before" and before:
        return before
    # A raw output goes by the plain name where no norm comes behind it.
    behind = [kind for kind in ("attn", "mlp") if anatomy.canonical(f"{kind}_raw") == f"{kind}_raw"]
    order = ("block_in", "attn_in", "attn_out", "mlp_in", "mlp_out")
    return sorted([*before, *(f"{kind}_out" for kind in behind)], key=order.index)
