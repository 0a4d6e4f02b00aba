"""Contrastive Activation Addition: add the mean difference between two sides of a contrast.

    v = mean over positive items of h  -  mean over negative items of h          (paper, eq. 1, paired)
    h' = h + strength * v

Rimsky, Gabrieli, Schulz, Tong, Hubinger, Turner (2024), "Steering Llama 2 via Contrastive Activation Addition",
arXiv 2312.06681.

Where this file departs. The paper reads the answer's letter two tokens before the end; here the readout is a setting
of `fit` (the letter is `readout=-2` of such texts, or a character span), and means over the answer are the usual choice
for free text. The paper steers strictly after the prompt's end marker; the default scope here starts at the last prompt
token, whose output is the first generated token (`scope="generated"` is one later, as published). Sides of unequal
size are allowed. The released code rescales the vectors of a group of behaviours to one length: `equalise`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from steerkit.errors import FitError
from steerkit.maths.directions import equal_norms
from steerkit.methods._addition import MeanDifference
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["ContrastiveActivationAddition", "equalise"]


@dataclass(frozen=True)
class ContrastiveActivationAddition(MeanDifference):
    """Add the mean difference of a contrast set, at any kind of site.

    Strength 1 adds the mean difference itself; 0 is the identity; negative strengths steer to the other side.

    Example:
        >>> import torch
        >>> ContrastiveActivationAddition().fit_site(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        {'direction': tensor([ 2., -1.])}
    """

    name: ClassVar[str] = "caa"
    title: ClassVar[str] = "Contrastive Activation Addition"
    paper: ClassVar[str] = "Rimsky et al. 2024, arXiv 2312.06681"
    readout: ClassVar[str | None] = "last"
    scope: ClassVar[str] = "response"


def equalise(vectors: Mapping[str, SteeringVector]) -> dict[str, SteeringVector]:
    """Rescale the vectors of several behaviours so that at each site all have the same length (their mean length).

    Args:
        vectors: behaviour to vector, all with the same sites.

    Returns:
        behaviour to a rescaled copy.

    Raises:
        FitError: the vectors do not share their sites, or one has no length.
    """
    sites = {vector.sites for vector in vectors.values()}
    if len(sites) > 1:
        raise FitError("equalise: the vectors have different sites; fit them all at the same ones")
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in vectors}
    for site in next(iter(sites), ()):
        scaled = equal_norms({name: vector.params(site)["direction"] for name, vector in vectors.items()})
        for name, direction in scaled.items():
            tensors[name][f"{site}/direction"] = direction
    return {name: replace(vector, tensors={**vector.tensors, **tensors[name]}) for name, vector in vectors.items()}
