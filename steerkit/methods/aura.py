"""AurA: damp every neuron by how well it alone detects the unwanted side.

    a = AUROC of a neuron's largest value in a text, as a detector of the negative side's texts; ties count half
    g = 1 - 2 (a - 1/2)  where a > 1/2,  else 1
    h' = (1 - strength) h + strength * g h

A neuron that detects the negative side no better than chance is left alone, one that never errs is silenced.

Xavier Suau, Pieter Delobelle, Katherine Metcalf, Armand Joulin, Nicholas Apostoloff, Luca Zappella, Pau Rodriguez
(2024), "Whispering Experts: Neural Interventions for Toxicity Mitigation in Language Models", arXiv 2407.12824, as the
released code of Activation Transport (arXiv 2410.23054) has it, which compares itself with it.

Where this file departs. A row's first token never enters the largest value. The neurons are by default those of the
MLP's hidden layer (`mlp_post`), which the papers' configurations do not name: `sites=` takes any. Strengths above 1
stop at silence: no neuron changes its sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from steerkit.errors import FitError
from steerkit.maths import edits
from steerkit.maths.probes import aucs
from steerkit.methods._affine_weights import folded
from steerkit.methods._base import Method, whole_and_thirds
from steerkit.methods._protocols import Params, PartsTable, Prepared, WeightUpdate
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.network.tap import sites_of_kind
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["AurA"]


@dataclass(frozen=True)
class AurA(Method):
    """Damp neurons that detect the negative side. Strength 1 is the paper's factor, 0 the identity.

    Negative strengths amplify what the positive ones damp. It only damps: there is no push towards the positive side.

    Example:
        >>> import torch
        >>> unwanted, wanted = torch.tensor([[3.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
        >>> AurA().fit_site(wanted, unwanted)
        {'factor': tensor([0.2500, 1.0000])}
    """

    name: ClassVar[str] = "aura"
    title: ClassVar[str] = "AurA: damping neurons that detect a side"
    paper: ClassVar[str] = "Suau et al. 2024, arXiv 2407.12824"
    params: ClassVar[Mapping[str, str]] = {"factor": "d"}
    readout: ClassVar[str | None] = "max"
    scope: ClassVar[str] = "all"
    default_strength: ClassVar[float | None] = 1.0
    strength_unit: ClassVar[str] = "share"
    ladder: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0)

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "scale"

    @property
    def takes_rows(self) -> bool:
        """Each row can have factors of its own."""
        return True

    def sites(self, decoder: Decoder) -> list[Site]:
        """The neurons of the MLP in every block that has one, whose down projection reads them.

        Args:
            decoder: the model's decoder.

        Raises:
            SiteError: no block has them, as with routed experts.
        """
        return sites_of_kind(decoder, "mlp_post")

    @classmethod
    def candidates(cls, num_layers: int) -> list[tuple[int, ...]]:
        """All blocks, and each third of them.

        Args:
            num_layers: of the model.
        """
        return whole_and_thirds(num_layers)

    def fit_site(self, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
        """The factor of each neuron.

        Args:
            positive: [n, d], the largest value of each neuron in each text.
            negative: [m, d], those of the side that is damped.

        Returns:
            ``{"factor": [d]}`` float32, from 0 to 1.

        Raises:
            FitError: no neuron detects the negative side.
        """
        factor = (2 - 2 * aucs(negative, positive)).clamp_max(1.0)
        if bool((factor == 1).all()):
            raise FitError("no neuron is larger on the negative side more often than not, so there is nothing to damp")
        return {"factor": factor.float()}

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """What is added of each neuron, 0 for those that stay and -1 for those that are silenced."""
        return {"gamma": self._gains(params, strength).to(device, dtype)}

    def _gains(self, params: Params, strength: Tensor) -> Tensor:
        """[..., d] float32 on the strength's device."""
        return (strength * (params["factor"].to(strength.device).float() - 1)).clamp_min(-1.0)

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """`h + gamma * h`; neurons of factor 1 are bitwise what they were."""
        return edits.scale_units(h, prepared["gamma"])

    def control(self, vector: SteeringVector, generator: torch.Generator) -> SteeringVector:
        """The factors of each site dealt out anew among its neurons.

        Args:
            vector: what this method fitted.
            generator: what draws.
        """
        dealt = {}
        for site in vector.sites:
            factor = vector.params(site)["factor"]
            dealt[f"{site}/factor"] = factor[torch.randperm(len(factor), generator=generator)]
        return replace(vector, tensors={**vector.tensors, **dealt})

    def table(self, vector: SteeringVector) -> PartsTable:
        """How many neurons of each site are damped, and how strongly.

        Args:
            vector: what this method fitted.
        """
        rows: list[tuple[str | int | float, ...]] = []
        for site in vector.sites:
            factor = vector.params(site)["factor"]
            damped = factor < 1
            mean = float(factor[damped].mean()) if bool(damped.any()) else 1.0
            rows.append((site.layer, int(damped.sum()), mean, float(factor.min())))
        return PartsTable(f"{len(rows)} sites", ("layer", "neurons damped", "their mean factor", "smallest"), rows)

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """Columns of the layers that read the neurons, or rows of the one that gives them.

        Raises:
            SiteError: no linear layers alone give or read them.
        """
        share = torch.tensor(float(strength), dtype=torch.float32)
        gains = {site: self._gains(vector.params(site), share) for site in vector.sites}
        return folded(model, {site: (gain, torch.zeros_like(gain)) for site, gain in gains.items()})
