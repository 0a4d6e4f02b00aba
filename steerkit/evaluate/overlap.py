"""How alike the directions of several vectors are, and how to make them orthogonal.

Vectors that share a site and point the same way push each other along. There they can be made orthogonal, with their
lengths kept:

    Gram and Schmidt   each one orthogonal to those before it; the first stays as it is, the order matters
    Loewdin            all of them bent as little as possible, none preferred: (U U^T)^(-1/2) U of the unit rows U

Loewdin (1950), "On the non-orthogonality problem connected with the use of atomic wave functions".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from steerkit.errors import FitError
from steerkit.maths.directions import orthonormalise, unit
from steerkit.methods._registry import method_of
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Overlap", "orthogonalise", "overlaps"]

# Unit rows whose smallest singular value is below this are one another's sum but for rounding.
_DEPENDENT = 1e-5


@dataclass(frozen=True)
class Overlap:
    """How alike two vectors are.

    Attributes:
        first: name of one.
        second: name of the other.
        cosines: cosine of their directions at each site they share; empty where they share none.
    """

    first: str
    second: str
    cosines: Mapping[Site, float]

    @property
    def note(self) -> str | None:
        """Why there is no cosine; None where there is."""
        return None if self.cosines else f"{self.first} and {self.second} have no direction at a site they share"


def overlaps(vectors: Mapping[str, SteeringVector]) -> tuple[Overlap, ...]:
    """Cosines between directions, for every pair of vectors at every site both act at.

    Args:
        vectors: by name. Signs are those of the stored directions, whatever the strengths.
    """
    found = []
    for first, second in combinations(vectors, 2):
        cosines: dict[Site, float] = {}
        for site in vectors[first].sites:
            if site not in vectors[second].sites:
                continue
            one, other = (method_of(vectors[name]).direction(vectors[name].params(site)) for name in (first, second))
            if one is None or other is None or not (bool(one.any()) and bool(other.any())):
                continue
            one, other = unit(one.double()), unit(other.double())
            cosines[site] = float(torch.dot(one, other))
        found.append(Overlap(first, second, cosines))
    return tuple(found)


def orthogonalise(vectors: Sequence[SteeringVector], *, symmetric: bool = False) -> tuple[SteeringVector, ...]:
    """Make directions orthogonal at every site that several vectors share; their lengths are kept.

    Args:
        vectors: in order of precedence.
        symmetric: bend all alike (Loewdin) instead of each against those before it (Gram and Schmidt).

    Returns:
        The vectors in the same order, complete; figures measured on held-out items are dropped from changed ones.

    Raises:
        FitError: the directions at a site are linearly dependent, or a vector has none there.
    """
    changed: list[dict[str, Tensor]] = [{} for _ in vectors]
    for site in dict.fromkeys(site for vector in vectors for site in vector.sites):
        group = [place for place, vector in enumerate(vectors) if site in vector.sites]
        if len(group) < 2:
            continue
        rows = torch.stack([_only_direction(vectors[place], site) for place in group])
        try:
            turned = _turned(rows, symmetric)
        except FitError as error:
            raise FitError(f"{site}: {error}") from None
        # The first of Gram and Schmidt's stays to the bit.
        for place, row in list(zip(group, turned, strict=True))[0 if symmetric else 1 :]:
            kept = vectors[place].params(site)["direction"]
            changed[place][f"{site}/direction"] = row.to(kept.dtype)
    note = {"orthogonalised": "symmetric" if symmetric else "in order", "of": [one.digest for one in vectors]}
    return tuple(
        replace(vector, tensors={**vector.tensors, **tensors}, held_out={}, extra={**vector.extra, **note})
        if tensors
        else vector
        for vector, tensors in zip(vectors, changed, strict=True)
    )


def _only_direction(vector: SteeringVector, site: Site) -> Tensor:
    """The one direction [d] of a vector at a site, in double precision."""
    direction = vector.params(site).get("direction")
    if direction is None or direction.dim() != 1 or not bool(direction.any()):
        raise FitError(f"{site}: a vector of {vector.method} has no single direction there to be made orthogonal")
    return direction.double()


def _turned(rows: Tensor, symmetric: bool) -> Tensor:
    """Orthogonal rows [k, d] of the lengths of the rows given."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    units = unit(rows)
    left, singular, right = torch.linalg.svd(units, full_matrices=False)
    if len(units) > units.shape[1] or float(singular[-1]) < _DEPENDENT:
        raise FitError("the directions are linearly dependent; drop one of the vectors")
    # With U = left S right, (U U^T)^(-1/2) U is left right.
    turned: Tensor = left @ right if symmetric else orthonormalise(units).double()
    return turned * length
