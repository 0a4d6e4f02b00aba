"""Any vector as a sparse sum of latents: which ones, how much of each, and what is left over.

    v ~ sum over i of w_i rows_i,   w_i >= 0, at most `most` of them

The latent along which most is left is taken next, and all weights are found anew by non-negative least squares, until
there are enough or none helps. Weights are not negative because latents are not: one that would be taken off is told by
another that points the other way, if there is one.

A dictionary has more rows than its width, so a few rows explain a part of *any* direction. What is explained of random
directions stands beside it, and only what is beyond that says that the vector is made of these latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerkit._support.precision import full_precision
from steerkit.dictionary.dictionary import Dictionary
from steerkit.errors import FitError, VectorMismatchError

__all__ = ["Decomposition", "decompose"]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A vector as a sum of latents.

    Attributes:
        latents: their numbers, the largest weight times length first.
        weights: [n] float32, units of each latent as the dictionary counts them, above 0.
        left: [d] float32, what no latent explains.
        explained: share of the vector's squared length.
        random: the same share for random directions, as many of them as were asked for.
    """

    latents: tuple[int, ...]
    weights: Tensor
    left: Tensor
    explained: float
    random: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data, without what is left over."""
        pairs = zip(self.latents, self.weights.tolist(), strict=True)
        return {
            "latents": [{"latent": latent, "weight": weight} for latent, weight in pairs],
            "explained": self.explained,
            "random": list(self.random),
        }


@full_precision()
def decompose(
    direction: Tensor, dictionary: Dictionary, *, most: int = 16, random: int = 10, seed: int = 0
) -> Decomposition:
    """Write a vector as a sum of at most some latents.

    Args:
        direction: [d], in the model's own activations.
        dictionary: of the vector's site.
        most: latents at the most.
        random: random directions that are decomposed beside it.
        seed: of these.

    Raises:
        VectorMismatchError: the vector is of another width than the dictionary.
        FitError: the vector is zero or not finite, or no latents are allowed.
    """
    rows = dictionary.rows(range(dictionary.num_latents)).decoder
    if tuple(direction.shape) != (dictionary.width,):
        raise VectorMismatchError(
            f"a vector of shape {list(direction.shape)}; the dictionary at {dictionary.site} has width "
            f"{dictionary.width}"
        )
    if most < 1:
        raise FitError(f"most = {most}; give at least 1 latent")
    wanted = direction.detach().to("cpu", torch.float32)
    if not (bool(torch.isfinite(wanted).all()) and bool(wanted.any())):
        raise FitError("a vector that is zero or not finite has no parts")
    latents, weights = _pursued(wanted, rows, most)
    drawn = torch.randn(random, dictionary.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    others = tuple(_explained(one, rows, *_pursued(one, rows, most)) for one in drawn)
    order = sorted(
        range(len(latents)), key=lambda at: -float(weights[at] * torch.linalg.vector_norm(rows[latents[at]]))
    )
    found, sizes = [latents[at] for at in order], weights[order]
    return Decomposition(
        tuple(found), sizes, wanted - sizes @ rows[found], _explained(wanted, rows, found, sizes), others
    )


def _pursued(wanted: Tensor, rows: Tensor, most: int) -> tuple[list[int], Tensor]:
    """Latents and their weights [n], all above 0, by orthogonal matching pursuit that is kept non-negative."""
    from scipy.optimize import nnls

    lengths = torch.linalg.vector_norm(rows, dim=-1).clamp_min(1e-12)
    chosen, weights = list[int](), torch.zeros(0, dtype=torch.float32)
    refused: set[int] = set()
    while len(chosen) < most:
        left = wanted - weights @ rows[chosen] if chosen else wanted
        along = rows @ left / lengths
        along[[*chosen, *refused]] = 0.0
        best = int(along.argmax())
        if float(along[best]) <= 1e-6 * float(torch.linalg.vector_norm(wanted)):
            break
        tried = [*chosen, best]
        found, _ = nnls(rows[tried].T.double().numpy(), wanted.double().numpy())
        kept = [place for place, weight in enumerate(found) if weight > 0.0]
        # A latent whose place another one takes over is not tried again, so that this ends.
        refused |= {tried[place] for place in range(len(tried)) if place not in kept}
        chosen = [tried[place] for place in kept]
        weights = torch.tensor([found[place] for place in kept], dtype=torch.float32)
    return chosen, weights


def _explained(wanted: Tensor, rows: Tensor, latents: list[int], weights: Tensor) -> float:
    """The share of a vector's squared length that some latents explain."""
    left = wanted - weights @ rows[latents] if latents else wanted
    return 1.0 - float(left.double().square().sum() / wanted.double().square().sum())
