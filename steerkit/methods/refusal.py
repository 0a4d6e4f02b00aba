"""The refusal direction: what a model reads off a request before it refuses, added or taken out.

    r[i, l] = mean over harmful prompts of x_l[i]  -  mean over harmless prompts of x_l[i]
    add:     x_l' = x_l + strength * r
    ablate:  every write to the stream loses its component along r

`x_l` is the input of block `l`, `i` a position of the template behind the instruction. One of these candidates is
selected, on prompts that were kept apart:

    bypass = refusal score of harmful prompts while r is ablated          the lowest wins
    induce = refusal score of harmless prompts while r is added at l      kept where >= `min_induce`
    kl     = KL(base || ablated) on harmless prompts, last position       kept where <= `max_kl`
    depth  = l < `max_depth` * number of blocks

Arditi, Obeso, Syed, Paleka, Panickssery, Gurnee, Nanda (2024), "Refusal in Language Models Is Mediated by a Single
Direction", arXiv 2406.11717. Two other sources of a direction, for models that do not refuse by themselves: refusing
minus complying openings (`source="responses"`, the behaviour vector of arXiv 2409.05907) and the output embeddings of
the words of refusals (`source="unembedding"`, arXiv 2505.20309).

Where this file departs. The default source is `responses`, which any model has. The released code lists by hand the
first tokens of each model's refusals; here they are taken from the model's own: a first token counts that opens a
larger share of its refusals than of its answers to harmless prompts (`openings` names others, of any number of tokens).
Positions are found in the rendered text, not counted by family, and means are taken over the prompts of each side that
the model treats as its side says, as in the released code. Candidates are tried in the order of their cost: deep ones
not at all, `induce` first, ablation only for those that pass. Scores and divergences are exact, without the 1e-6 and
1e-8 of the released code. Where no candidate is left, the code picks nothing and stops at an assertion; here the error
lists the best of them with the reason for each, and `error.candidates` holds all. A filter is relaxed by its setting.
Added, the fitted direction is written from the last prompt token on (the paper: all tokens, `scope="all"`, which is
what `induce` is measured with). As weights, the ablation is that of the method `ablation`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from steerkit.activations.recording import Activations
from steerkit.errors import FitError, StrengthError
from steerkit.maths import edits
from steerkit.maths.directions import unit
from steerkit.methods._addition import AddDirection
from steerkit.methods._base import TWO_KINDS, FittedOn
from steerkit.methods._protocols import Params, Prepared, WeightUpdate
from steerkit.methods._refusal import response_contrast, unembedding_direction
from steerkit.methods._selection import Selection, asked_prompts
from steerkit.methods._subject import Subject
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.network.writers import every_write
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.methods._selection import Candidate

__all__ = ["RefusalDirection"]


@dataclass(frozen=True)
class RefusalDirection(AddDirection):
    """Add the refusal direction, so that the model refuses; or ablate it, so that it does not.

    Added, strength 1 is the difference as it was read, 0 the identity; negative strengths refuse less. Ablated,
    strength is the share of the component that is taken out. The positive side of the data are harmful prompts, the
    negative side harmless ones; answers are left out. `responses` reads the positive side only, at each given site.
    `instructions` looks at all given sites (none: the input of every block) and leaves one.
    """

    name: ClassVar[str] = "refusal"
    title: ClassVar[str] = "Refusal direction"
    paper: ClassVar[str] = "Arditi et al. 2024, arXiv 2406.11717"
    data: ClassVar[FittedOn] = TWO_KINDS
    also: ClassVar[Mapping[str, str]] = {"selection": "n k"}
    readout: ClassVar[str | None] = None
    scope: ClassVar[str] = "response"

    source: Literal["responses", "instructions", "unembedding"] = "responses"
    """Where the direction is read: refusing minus complying openings, harmful minus harmless prompts, or the output
    embeddings of words."""
    apply: Literal["add", "ablate"] = "add"
    """What the vector does with it."""
    openings: tuple[str, ...] = ()
    """How answers that refuse begin, for the refusal score; none: first tokens of the model's own refusals."""
    as_labelled: bool = False
    """Keep prompts that the model does not treat as their side says: harmful ones it answers, harmless ones it
    refuses."""
    validation: int = 32
    """Prompts of each side on which candidates are scored, at most; a quarter of the data is kept for them."""
    min_induce: float = 0.0
    """Least refusal score of harmless prompts while the direction is added."""
    max_kl: float = 0.1
    """Largest divergence on harmless prompts while the direction is ablated, in nats."""
    max_depth: float = 0.8
    """Blocks from this share of the depth on are not tried."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation < 1:
            raise FitError(f"refusal: validation = {self.validation}; give a number of prompts of at least 1")

    @property
    def natural_strength(self) -> float | None:
        """Removal at strength 1 is whole; an addition's strength depends on model and data."""
        return 1.0 if self.apply == "ablate" else None

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "add" if self.apply == "add" else "project_out"

    @property
    def default_scope(self) -> str:
        """From the last prompt token on where it is added, every token where it is ablated."""
        return "response" if self.apply == "add" else "all"

    def sites(self, decoder: Decoder) -> list[Site]:
        """The input of every block; for `responses` one block's output, for `unembedding` every one's."""
        if self.source == "instructions":
            return [Site(layer, "resid_pre") for layer in range(decoder.num_layers)]
        if self.source == "unembedding" and self.apply == "add":
            return [Site(layer) for layer in range(decoder.num_layers)]
        return super().sites(decoder)

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Read the direction, and where there are candidates select one.

        Args:
            acts: unused; the method reads for itself.
            subject: the door to the model and to the prompts.
            sites: where to read.

        Returns:
            ``"<site>/direction"`` [d] of each site that is written, or ``"shared/direction"``; after a selection also
            ``"shared/selection"`` [k, 5], of every candidate that was fully scored layer, position, bypass, induce, kl.

        Raises:
            FitError: there is no direction, no refusal to know others by, or no candidate passes all filters (then
                `candidates` holds every `Candidate`).
            DataError: too few prompts to keep some apart.
        """
        if self.source == "unembedding":
            subject.record(
                asked_prompts(subject.data.negative), sites, readout="last"
            )  # for the norms that strengths are counted in
            return {"shared/direction": unembedding_direction(subject)}
        if self.source == "instructions":
            best, direction, selection = Selection(self, subject, sites).run()
            name = f"{best.site}/direction" if self.apply == "add" else "shared/direction"
            return {name: direction, "shared/selection": selection}
        found = response_contrast(subject, asked_prompts(subject.data.positive), sites)
        if self.apply == "add":
            return {f"{site}/direction": direction for site, direction in found.items()}
        if len(sites) != 1:
            raise FitError(f"refusal: one direction is ablated, got {len(sites)} sites; fit at one of them")
        return {"shared/direction": found[sites[0]]}

    def written(self, sites: list[Site], tensors: Mapping[str, Tensor], decoder: Decoder) -> list[Site]:
        """The selected site, all sites, or every write to the stream.

        Args:
            sites: where it was fitted.
            tensors: what `fit` gave.
            decoder: the model's decoder.

        Raises:
            SiteError: the model writes to its stream where there is no site.
        """
        if self.apply == "ablate":
            return every_write(decoder)
        return [site for site in sites if f"{site}/direction" in tensors] or sites

    def length(self, params: Params) -> float | None:
        """Norm of the direction; None where it is ablated, because then no length is added."""
        return super().length(params) if self.apply == "add" else None

    @property
    def takes_rows(self) -> bool:
        """Where the direction is added; what is projected out is one for all rows."""
        return self.apply == "add"

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The direction times the strength; or at length 1, and the share to be removed."""
        if self.apply == "add":
            return super().prepare(params, strength, dtype, device)
        wide = torch.promote_types(dtype, torch.float32)
        return {"direction": unit(params["direction"].double()).to(wide).to(device), "share": strength.to(wide)}

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """`h + strength * r`, or `h - strength * (h . u) u`."""
        if self.apply == "add":
            return super().edit(h, prepared, tokens)
        return edits.project_out(h, prepared["direction"], share=prepared["share"], is_unit=True)

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """As for every addition.

        Raises:
            StrengthError: the direction is ablated.
            SiteError: it is added at another kind of site than `resid_post`.
        """
        if self.apply == "ablate":
            raise StrengthError("refusal: as weights, ablation is the method 'ablation'; fit that one, or use hooks")
        return super().weight_updates(model, vector, strength)

    def _is_shallow(self, layer: int, decoder: Decoder) -> bool:
        return layer < int(self.max_depth * decoder.num_layers)

    def scored(self, candidate: Candidate) -> Candidate:
        """A candidate with the filters it does not pass.

        Args:
            candidate: with all of its scores.
        """
        # Written so that nan fails.
        fails = {
            "induce": not candidate.induce >= self.min_induce,
            "kl": not candidate.kl <= self.max_kl,
            "finite": not math.isfinite(candidate.bypass),
        }
        return candidate._replace(reasons=tuple(name for name, failed in fails.items() if failed))
