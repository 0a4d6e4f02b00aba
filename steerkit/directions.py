"""Pure functions from activations to directions, shared by the methods.

Shapes: `n` and `m` rows (prompts) of the two sides, `d` width of the site. Everything is computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steerkit.errors import FitError

__all__ = [
    "equal_norms",
    "mean_difference",
    "orient",
    "orthonormalise",
    "pair_differences",
    "principal_direction",
    "random_direction",
    "unit",
]


def mean_difference(positive: Tensor, negative: Tensor) -> Tensor:
    """Mean of the positive rows minus mean of the negative rows (CAA, arXiv 2312.06681).

    Args:
        positive: [n, d] activations.
        negative: [m, d] activations.

    Returns:
        [d], float32.

    Raises:
        FitError: the two means are equal, so there is no direction.
    """
    means = positive.float().mean(dim=0), negative.float().mean(dim=0)
    difference = means[0] - means[1]
    # The same texts in another order differ by rounding only.
    if float(difference.norm()) <= 1e-6 * max(float(mean.norm()) for mean in means):
        raise FitError("the two sides have the same mean activation, so there is no direction between them")
    return difference


def pair_differences(positive: Tensor, negative: Tensor, *, paired: bool) -> Tensor:
    """Rows to find a contrast's main axis in, never centred on their own mean.

    Pairs give their differences; unpaired sides give every row's offset from the midpoint of the two means (negative
    rows mirrored). Centring differences on their mean would remove the very direction wanted.

    Args:
        positive: [n, d] activations.
        negative: [m, d] activations.
        paired: row `i` of both sides belong together.

    Returns:
        [n, d] or [n + m, d], float32.
    """
    positive, negative = positive.float(), negative.float()
    if paired and positive.shape == negative.shape:
        return positive - negative
    middle = (positive.mean(dim=0) + negative.mean(dim=0)) / 2
    return torch.cat([positive - middle, middle - negative])


def principal_direction(rows: Tensor) -> Tensor:
    """First right singular vector of the rows, uncentred, pointing where most of the rows' sum points.

    Args:
        rows: [n, d].

    Returns:
        [d], unit length, float32.

    Raises:
        FitError: all rows are zero.
    """
    if not bool(rows.any()):
        raise FitError("all differences are zero, so there is no direction between the two sides")
    direction = torch.linalg.svd(rows.double(), full_matrices=False).Vh[0]
    return orient(unit(direction), rows.double().mean(dim=0)).float()


def orient(direction: Tensor, reference: Tensor) -> Tensor:
    """Flip a direction so that it points along a reference; along its own largest entry where they are orthogonal.

    Args:
        direction: [d].
        reference: [d].

    Returns:
        [d], the direction or its negative.
    """
    along = torch.dot(direction, reference.to(direction.dtype))
    if float(along) == 0.0:
        along = direction[direction.abs().argmax()]
    return -direction if float(along) < 0 else direction


def unit(direction: Tensor) -> Tensor:
    """Scale to length 1.

    Args:
        direction: [..., d].

    Raises:
        FitError: a direction has no length.
    """
    length: Tensor = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    if not bool((length > 0).all()):
        raise FitError("a direction of length 0 cannot be scaled to length 1")
    return direction / length


def orthonormalise(directions: Tensor) -> Tensor:
    """Orthonormal rows that span the same space, the first one kept (QR, signs preserved).

    Args:
        directions: [k, d], k <= d.

    Returns:
        [k, d], float32.

    Raises:
        FitError: the rows are linearly dependent.
    """
    q: Tensor
    r: Tensor
    q, r = torch.linalg.qr(directions.double().T)
    diagonal = torch.diagonal(r)
    if bool((diagonal.abs() < 1e-9 * diagonal.abs().max()).any()):
        raise FitError("the directions are linearly dependent; drop one of them")
    return (q * diagonal.sign()).T.float()


def random_direction(like: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction of the same shape and norm, the control every effect is shown beside.

    Args:
        like: [..., d].
        generator: what draws, on the CPU; several draws from one generator are independent.

    Returns:
        the shape and dtype of `like`, each [d] row with the norm of its row in `like`.
    """
    draw = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    norm: Tensor = torch.linalg.vector_norm(like.float().cpu(), dim=-1, keepdim=True)
    return (unit(draw) * norm).to(like)


def equal_norms(directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rescale the directions of several behaviours at one site to their mean length (CAA's released code).

    So one strength means the same size for every behaviour.

    Args:
        directions: name to [d].

    Returns:
        name to [d], all of the same length.

    Raises:
        FitError: a direction has no length.
    """
    lengths = {name: float(torch.linalg.vector_norm(direction)) for name, direction in directions.items()}
    for name, length in lengths.items():
        if length == 0:
            raise FitError(f"{name}: a direction of length 0 cannot be rescaled")
    mean = sum(lengths.values()) / max(len(lengths), 1)
    return {name: direction * (mean / lengths[name]) for name, direction in directions.items()}
