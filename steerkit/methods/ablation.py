"""Directional ablation: take the component along one direction out of the residual stream.

    r = mean over positive items of h  -  mean over negative items of h,       u = r / |r|
    h' = h - strength * (h . u) u
    weights that write to the stream:   W' = W - u (u^T W),   biases b' = b - (u . b) u

Arditi, Obeso, Syed, Paleka, Panickssery, Gurnee, Nanda (2024), "Refusal in Language Models Is Mediated by a Single
Direction", arXiv 2406.11717.

Where this file departs. The paper takes one direction, fitted at one site, out of every write to the stream: what each
block reads, what attention adds, what the MLP adds. That is `writes="every"`. The default takes each fitted site's own
direction out at that site only, like every other method here; later blocks may then write the direction anew, so it is
not gone from the model (the scorer `projection` shows how much is left at the last block). The component is computed in
float32 and nothing is changed in place. Sub-block outputs are written after a post-norm where the family has one,
because its gain would bring the direction back; the released code writes before it. Biases and every expert belong to
the weight form, which the released code leaves out. A tied head would be edited with the embeddings, so tied models are
refused unless `untie` is set, and so are families with post-norms, for which no edit of existing weights is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from steerkit.activations.recording import Activations
from steerkit.errors import FitError, SiteError, StrengthError, VectorMismatchError
from steerkit.maths import edits
from steerkit.maths.directions import unit
from steerkit.maths.rank_two import RankTwo, rank_two
from steerkit.methods._addition import FittedOnMeans
from steerkit.methods._protocols import Params, Prepared, WeightUpdate
from steerkit.methods._subject import Subject
from steerkit.network.decoder import Decoder, find_decoder
from steerkit.network.expert_matrices import Matrix
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.network.writers import every_write, matrices_at, other_uses, writing_matrices
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["DirectionalAblation"]


@dataclass(frozen=True)
class DirectionalAblation(FittedOnMeans):
    """Remove the mean difference of a contrast set from the activations.

    Strength is the share of the component that is taken out: 1 removes it, 0 is the identity, 0.5 halves it. Over 1 the
    component changes its sign (2 mirrors it), and negative strengths make it larger (-1 doubles it).

    Example:
        >>> import torch
        >>> DirectionalAblation().fit_site(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        {'direction': tensor([ 2., -1.])}
    """

    name: ClassVar[str] = "ablation"
    title: ClassVar[str] = "Directional ablation"
    paper: ClassVar[str] = "Arditi et al. 2024, arXiv 2406.11717"
    readout: ClassVar[str | None] = "last"
    scope: ClassVar[str] = "all"
    params: ClassVar[Mapping[str, str]] = {"direction": "d"}
    default_strength: ClassVar[float | None] = 1.0
    strength_unit: ClassVar[str] = "share"
    ladder: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0)

    writes: str | tuple[str, ...] = "fitted"
    """Where it is removed: `fitted` (each site its own direction), `every` (one direction from every write to the
    residual stream) or names of sites (one direction there)."""
    untie: bool = False
    """In the weight form, give the embeddings of a tied model weights of their own, so that the head stays as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.writes in ("fitted", "every"):
            return
        listed = self.writes if isinstance(self.writes, tuple | list) else ()
        if not listed or not all(isinstance(site, str) for site in listed):
            raise FitError(f"ablation: writes {self.writes!r}: give 'fitted', 'every' or a list of names of sites")
        if len({Site.parse(site) for site in listed}) < len(listed):
            raise FitError(f"ablation: writes {', '.join(listed)} names a site twice; name each once")

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "project_out"

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Fit each site, or the one direction that is removed elsewhere.

        Args:
            acts: activations of both sides at every site.
            subject: whose stream is written.
            sites: where to fit; one, unless `writes` is ``"fitted"``.

        Returns:
            ``"<site>/direction"`` or ``"shared/direction"`` to [d].

        Raises:
            FitError: both means are equal; or one direction is wanted and there are several sites, or a site that is
                not as wide as the stream.
        """
        tensors = super().fit(acts, subject, sites)
        if self.writes == "fitted":
            return tensors
        if len(sites) != 1:
            names = ", ".join(map(str, sites))
            raise FitError(f"ablation: writes={self.writes!r} removes one direction, got {names}; fit at one of them")
        (direction,) = tensors.values()
        if self.writes == "every" and len(direction) != subject.decoder.hidden_size:
            raise FitError(
                f"ablation: {sites[0]} has width {len(direction)}, the residual stream {subject.decoder.hidden_size}; "
                "fit at a site of the stream, such as resid_post"
            )
        return {"shared/direction": direction}

    def written(self, sites: list[Site], tensors: Mapping[str, Tensor], decoder: Decoder) -> list[Site]:
        """The sites of `writes`.

        Args:
            sites: where it was fitted.
            tensors: what `fit` gave.
            decoder: the model's decoder.

        Raises:
            SiteError: the model has no such sites or not as wide, or writes to its stream where there is none.
        """
        if self.writes == "fitted":
            return sites
        if self.writes == "every":
            return every_write(decoder)
        found = locate(decoder.model, [Site.parse(site) for site in self.writes])
        width = len(tensors["shared/direction"])
        for site, tap in found.items():
            if tap.width not in (None, width):
                raise SiteError(f"{site} is {tap.width} wide, the direction {width}; write only sites as wide as it is")
        return list(found)

    def check(self, site: Site, params: Params) -> None:
        """One direction [d] per site, not zero.

        Raises:
            VectorMismatchError: there is none, it has another shape, or no length.
        """
        super().check(site, params)
        if not bool(params["direction"].any()):
            raise VectorMismatchError(f"{site}: the direction has length 0, so there is nothing to remove; fit again")

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The direction at length 1, in float32 at least, and the share to be removed."""
        wide = torch.promote_types(dtype, torch.float32)
        return {"direction": unit(params["direction"].double()).to(wide).to(device), "share": strength.to(wide)}

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """`h - strength * (h . u) u`."""
        return edits.project_out(h, prepared["direction"], share=prepared["share"], is_unit=True)

    def rank_two(self, params: Params) -> RankTwo:
        """The projection as numbers.

        Args:
            params: the tensors of one site.
        """
        return rank_two(unit(params["direction"].double()), {("along", "strength"): -1.0})

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """Take the direction out of the matrices and biases that write at the vector's sites.

        At the outputs of linear layers any share can be taken out. Removal at every write edits the embeddings too, and
        takes all: as exact as the hooks for token ids; `inputs_embeds` do not pass through the embeddings.

        Raises:
            StrengthError: removal at every write with another strength than 1, which repeated removal would not be.
            SiteError: no linear layer writes at a site, a norm follows it, an adapter writes beside it, or its weights
                are another part's too, as where the head is tied to the embeddings.
        """
        decoder = find_decoder(model)
        is_every = self.writes == "every" and set(vector.sites) == set(every_write(decoder))
        if is_every and strength != 1.0:
            raise StrengthError(
                f"ablation: strength {strength:g} at every write has no exact weight form, only 1; steer with hooks"
            )
        try:
            found = {vector.sites[0]: writing_matrices(decoder)} if is_every else matrices_at(decoder, vector.sites)
        except SiteError as error:
            raise SiteError(
                f"ablation has no exact weight form here ({error}); write at every write (writes='every') or at "
                "outputs of linear layers, such as attn_out and mlp_out, or steer with hooks"
            ) from None
        self._refuse_shared(decoder, [matrix for listed in found.values() for matrix in listed])
        return [
            WeightUpdate(
                matrix.name, _without(vector.params(site)["direction"], matrix.axis, strength), int(not matrix.axis)
            )
            for site, listed in found.items()
            for matrix in listed
        ]

    def _refuse_shared(self, decoder: Decoder, matrices: Sequence[Matrix]) -> None:
        """Refuse weights that another part of the model uses too.

        Raises:
            SiteError: with both names.
        """
        for name, other in () if self.untie else other_uses(decoder, matrices).items():
            raise SiteError(
                f"ablation: {type(decoder.model).__name__} uses `{name}` as `{other}` too (tied weights), which would "
                "be edited with it; give it weights of its own (untie=True, bake --untie), or steer with hooks"
            )


def _without(direction: Tensor, axis: int, share: float) -> Callable[[Tensor | None], Tensor]:
    """A change that takes a share of a direction out of a weight, along the axis that writes it."""

    def update(old: Tensor | None) -> Tensor:
        assert old is not None
        return edits.project_out(old.movedim(axis, -1), direction, share=share).movedim(-1, axis)

    return update
