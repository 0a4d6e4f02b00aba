"""The plain addition that many papers share, and the direction that many of them add: the difference of two means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from steerkit.activations.moments import Means
from steerkit.errors import SiteError
from steerkit.maths import edits
from steerkit.maths.directions import coordinates, mean_difference
from steerkit.maths.rank_two import RankTwo, rank_two
from steerkit.methods._base import Method
from steerkit.methods._protocols import Params, Prepared, WeightUpdate
from steerkit.network.sites import Site
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.network.decoder import Decoder

__all__ = ["AddDirection", "FittedOnMeans", "MeanDifference"]


@dataclass(frozen=True)
class AddDirection(Method):
    """Base of the methods that add `strength * direction` to every written token, `direction` being [d] per site.

    A subclass writes `fit_site`, which returns ``{"direction": ...}``.
    """

    params: ClassVar[Mapping[str, str]] = {"direction": "d"}

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "add"

    @property
    def takes_rows(self) -> bool:
        """Each row can have a direction of its own."""
        return True

    def length(self, params: Params) -> float | None:
        """Norm of the direction."""
        return float(torch.linalg.vector_norm(params["direction"].float()))

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """`strength * direction`, multiplied in float32 and rounded once.

        Returns:
            ``{"direction": [d]}``, or [b, 1, d] where each row has its own strength.
        """
        return {"direction": (strength * params["direction"].to(device).float()).to(dtype)}

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """`h + strength * direction`.

        Args:
            h: [b, t, d] activations.
            prepared: what `prepare` gave.
            tokens: unused; every token is changed, and the caller keeps those of the scope. Not for `front`, `mid` and
                `back`, where it would keep the whole prompt.

        Returns:
            [b, t, d]
        """
        return edits.add(h, prepared["direction"])

    def rank_two(self, params: Params) -> RankTwo:
        """The addition as numbers.

        Args:
            params: the tensors of one site.
        """
        return rank_two(params["direction"], {("one", "strength"): 1.0})

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """A constant is a bias of the linear layer behind it.

        At a block's output, of the last one that writes to it, or of every expert; at the heads (`z`) or the neurons
        (`mlp_post`), of the projection that reads them, which takes what it makes of the constant.

        Args:
            model: the transformers model.
            vector: a vector of this method.
            strength: in the vector's paper unit.

        Raises:
            SiteError: the block has no such layer behind which nothing changes the sum.
        """
        from steerkit.network.decoder import find_decoder
        from steerkit.network.kernel_share import PROJECTED

        for site in vector.sites:
            if site.kind not in ("resid_post", *PROJECTED):
                raise SiteError(
                    f"{site}: only additions at resid_post, z and mlp_post have an exact weight form; steer with hooks"
                )
        decoder = find_decoder(model)
        names = _output_biases(decoder, {site.layer for site in vector.sites if site.kind == "resid_post"})
        updates = []
        for site in vector.sites:
            shift = strength * vector.params(site)["direction"].float()
            if site.kind == "resid_post":
                updates += [WeightUpdate(name, _shifted(shift)) for name in names[site.layer]]
            else:
                updates.append(_through_projection(decoder, site, shift))
        return updates


@dataclass(frozen=True)
class FittedOnMeans(Method):
    """Base of the methods whose direction is the mean of the positive side minus the mean of the negative side."""

    def statistics(self, site: Site) -> Means:
        """Two running means; no activation is kept.

        Args:
            site: where they accumulate.
        """
        return Means()

    def fit_site(self, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
        """Take the difference of the two means.

        Args:
            positive: [n, d] float32.
            negative: [m, d] float32; n and m may differ.

        Returns:
            ``{"direction": [d]}``

        Raises:
            FitError: both means are equal.
        """
        return {"direction": mean_difference(positive, negative)}


@dataclass(frozen=True)
class MeanDifference(FittedOnMeans, AddDirection):
    """Base of the methods that add the mean of the positive side minus the mean of the negative side.

    Example:
        >>> import torch
        >>> MeanDifference().fit_site(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        {'direction': tensor([ 2., -1.])}
    """


def _output_biases(decoder: Decoder, layers: set[int]) -> dict[int, list[str]]:
    """The biases that take a constant at the outputs of some blocks.

    Raises:
        SiteError: a block has none.
    """
    from steerkit.network.output_biases import output_biases

    try:
        return output_biases(decoder, layers)
    except SiteError as error:
        raise SiteError(f"an addition at a block's output has no exact weight form here ({error})") from None


def _through_projection(decoder: Decoder, site: Site, shift: Tensor) -> WeightUpdate:
    """What the projection that reads a site makes of a constant [d] there, as a change of its bias.

    Raises:
        SiteError: no one linear layer reads the site.
    """
    from steerkit.network.kernel_share import projection

    try:
        linear = projection(decoder, site)
        matrix = linear.weight(decoder.model.dtype)
    except SiteError as error:
        raise SiteError(f"{site}: an addition there has no exact weight form ({error}); steer with hooks") from None
    return WeightUpdate(f"{linear.tap.name}.bias", _shifted(coordinates(matrix, shift.to(matrix.device))))


def _shifted(shift: Tensor) -> Callable[[Tensor | None], Tensor]:
    """A change that adds `shift` to a bias, and makes the bias where there is none."""

    def update(old: Tensor | None) -> Tensor:
        return shift.clone() if old is None else old + shift.to(old.device)  # [out], or of experts [n, out]

    return update
