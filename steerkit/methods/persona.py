"""Persona vectors: add the mean difference between what an assistant with a trait says and what one without it says.

    a(x, y) = mean over the tokens of answer y to prompt x of h          (or over the prompt's tokens, or its last one)
    v = mean over responses under trait-inducing prompts of a  -  mean over those under opposite prompts of a
    h' = h + strength * v                                                 (paper, section 3)

Every response counts equally, however long it is. `steerkit persona extract` makes such responses from the description
of a trait and keeps those that show it.

    v_inc[k] = v[k] - v[the site before k]     with `incremental`, added at every site at once

Chen, Arditi, Sleight, Evans, Lindsey (2025), "Persona Vectors: Monitoring and Controlling Character Traits in Language
Models", arXiv 2507.21509.

Where this file departs. The paper's coefficients are 0.5 to 2.5 for models of 7 billion parameters. What a small model
says under two system prompts differs less, and so does the vector: the ladder of strengths goes further, up to what a
calibration's budget allows. The paper writes its vectors at the last token of every pass; the default scope here is the
same set of tokens, told by position. Prompt means leave each row's first token out: some models park huge activations
there. The paper's incremental vectors begin with the embeddings; here the first site keeps its vector whole, so that
the increments up to a site always add up to that site's own vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from steerkit.activations.recording import Activations
from steerkit.errors import FitError
from steerkit.methods._addition import MeanDifference
from steerkit.methods._subject import Subject
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site

__all__ = ["PersonaVector"]


@dataclass(frozen=True)
class PersonaVector(MeanDifference):
    """Add the mean difference of responses with and without a trait.

    Strength 1 adds the difference itself; 0 is the identity; negative strengths suppress the trait.

    Example:
        >>> import torch
        >>> PersonaVector().fit_site(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0]]))
        {'direction': tensor([1., 0.])}
    """

    name: ClassVar[str] = "persona"
    title: ClassVar[str] = "Persona vectors"
    paper: ClassVar[str] = "Chen et al. 2025, arXiv 2507.21509"
    readout: ClassVar[str | None] = "response_mean"
    scope: ClassVar[str] = "response"
    ladder: ClassVar[tuple[float, ...]] = (1.0, 2.0, 4.0)

    incremental: bool = False
    """Write at every block, each with what its vector has more than that of the site before."""

    def sites(self, decoder: Decoder) -> list[Site]:
        """The output of the block at 40 % of the depth; with `incremental`, of every block.

        Args:
            decoder: the model's decoder.
        """
        if self.incremental:
            return [Site(layer, "resid_post") for layer in range(decoder.num_layers)]
        return super().sites(decoder)

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Fit every site; with `incremental`, turn the vectors into increments along the depth.

        Args:
            acts: activations of both sides at every site.
            subject: unused.
            sites: where to read.

        Returns:
            ``"<site>/direction"`` to [d].

        Raises:
            FitError: a site's means are equal, or increments are asked for along other sites than block outputs.
        """
        whole = super().fit(acts, subject, sites)
        if not self.incremental:
            return whole
        kinds = sorted({site.kind for site in sites})
        if kinds != ["resid_post"]:
            raise FitError(f"persona: increments run along resid_post, not {', '.join(kinds)}; leave incremental out")
        ordered = [f"{site}/direction" for site in sorted(sites, key=lambda site: site.layer)]
        before = dict(zip(ordered[1:], ordered, strict=False))
        return {name: whole[name] - whole[before[name]] if name in before else whole[name] for name in ordered}
