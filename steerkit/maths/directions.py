"""Pure functions from activations to directions, shared by the methods.

Shapes: `n` and `m` rows (prompts) of the two sides, `d` width of the site. Everything is computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from steerkit.errors import FitError
from steerkit.network.sites import Site

__all__ = [
    "coordinates",
    "discriminative_sites",
    "equal_norms",
    "mean_difference",
    "orient",
    "orthonormalise",
    "pair_differences",
    "principal_direction",
    "random_direction",
    "side_projections",
    "steering_plane",
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
    # Compiled code may not look at a value; what it scales was scaled before it was compiled, when it was planned.
    if not torch.compiler.is_compiling() and not bool((length > 0).all()):
        raise FitError("a direction of length 0 cannot be scaled to length 1")
    return direction / length


def coordinates(rows: Tensor, direction: Tensor) -> Tensor:
    """Inner products of activations with a direction, in their own precision under autocast too.

    Args:
        rows: [..., d].
        direction: [d], in the dtype and on the device of the rows.

    Returns:
        [...]
    """
    device = rows.device.type
    if not torch.amp.is_autocast_available(device):  # the meta device
        return rows @ direction
    with torch.autocast(device, enabled=False):
        return rows @ direction


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


def steering_plane(candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The plane of Angular and Selective Steering (arXiv 2510.26243, arXiv 2601.19375) from one direction per site.

    b1 is the candidate with the largest mean cosine to all of them (the first one of equals). b2 is the first principal
    axis of the unit candidates, centred on their mean, its largest entry made positive, and then made orthogonal to
    b1. As in the released code, but normalised and made orthogonal in float64, by an exact decomposition, and with a
    guard: an axis along b1 would leave rounding noise for b2, so the next one is taken. Where all candidates lie on one
    line (as a single one does), b2 is any axis across it, as in the released code, and means nothing.

    Args:
        candidates: [k, d] one direction per site, of any lengths. A zero row (a site where the sides do not differ) is
            a point at zero for the principal axis, as in the released code, but never b1.

    Returns:
        b1 [d] and b2 [d], float32, orthonormal.

    Raises:
        FitError: the candidates have another shape, one is not finite, or all are zero.
    """
    if candidates.dim() != 2:
        raise FitError(f"candidates have shape {tuple(candidates.shape)}; give [k, d], one direction per site")
    if not bool(torch.isfinite(candidates).all()):
        raise FitError("a candidate direction is not finite, so there is no plane")
    rows = candidates.detach().double().clone()
    known = torch.linalg.vector_norm(rows, dim=-1) > 0
    if not bool(known.any()):
        raise FitError("all candidate directions are zero, so there is no plane")
    rows[known] = unit(rows[known])
    typical = (rows * rows.mean(dim=0)).sum(dim=-1).masked_fill(~known, -torch.inf)
    b1 = rows[int((typical >= typical.max() - 1e-12).nonzero()[0])]
    _, sizes, axes = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    for size, axis in zip(sizes, axes, strict=True):
        axis = axis * axis[axis.abs().argmax()].sign()
        apart = axis - torch.dot(axis, b1) * b1
        if float(size) > 1e-6 and float(apart.norm()) > 1e-3:
            break
    else:  # all on one line: the coordinate axis that lies farthest from it
        axis = torch.eye(len(b1), dtype=b1.dtype)[int(b1.abs().argmin())]
        apart = axis - torch.dot(axis, b1) * b1
    b1, b2 = orthonormalise(torch.stack([b1, apart]))
    return b1, b2


def side_projections(
    positive: Mapping[Site, Tensor],
    negative: Mapping[Site, Tensor],
    direction: Tensor,
    *,
    rule: Literal["unit_samples", "class_means"] = "unit_samples",
) -> dict[Site, tuple[float, float]]:
    """Where the two sides lie along a direction, on average, at every site that both sides have.

    Args:
        positive: site to [n, d].
        negative: site to [m, d].
        direction: [d]; its length is of no matter, and along a zero one everything lies at 0.
        rule: ``unit_samples`` scales every row to length 1 first (Selective Steering's released code);
            ``class_means`` projects the mean row (the paper's eq. 9).

    Returns:
        site to the means of the positive and of the negative side.

    Raises:
        FitError: an unknown rule.
    """
    if rule not in ("unit_samples", "class_means"):
        raise FitError(f"rule {rule!r} is none of unit_samples, class_means")
    length = torch.linalg.vector_norm(direction.double())
    along = direction.double() / length if float(length) > 0 else torch.zeros_like(direction, dtype=torch.double)

    def mean(rows: Tensor) -> float:
        # A batch of samples in double precision would double the memory; the mean of the products needs it only.
        wide = rows.float()
        if rule == "unit_samples":
            wide = wide / (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + 1e-8)
        return float(coordinates(wide, along.float()).double().mean())

    return {site: (mean(rows), mean(negative[site])) for site, rows in positive.items() if site in negative}


def discriminative_sites(
    positive: Mapping[Site, Tensor],
    negative: Mapping[Site, Tensor],
    direction: Tensor,
    *,
    rule: Literal["unit_samples", "class_means"] = "unit_samples",
    whole_blocks: bool = True,
) -> list[Site]:
    """The sites where the two sides lie on opposite sides of zero along a direction (Selective Steering).

    Args:
        positive: site to [n, d].
        negative: site to [m, d]; a site missing here is not chosen.
        direction: [d].
        rule: see `side_projections`.
        whole_blocks: choose a block's sites together or not at all, as the released code does and the paper does not
            say.

    Returns:
        The sites, in the order of `positive`. A product of exactly 0, or a nan, does not count as opposite.

    Raises:
        FitError: an unknown rule.
    """
    found = side_projections(positive, negative, direction, rule=rule)
    opposite = {site for site, (plus, minus) in found.items() if plus * minus < 0}
    left_out = {site.layer for site in positive if site not in opposite} if whole_blocks else set()
    return [site for site in positive if site in opposite and site.layer not in left_out]
