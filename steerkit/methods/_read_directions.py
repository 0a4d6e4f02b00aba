"""The directions that a monitor projects on, one at each site of its vector that has one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from steerkit.errors import DataError
from steerkit.maths.directions import unit
from steerkit.methods._protocols import read_direction
from steerkit.methods._registry import method_of
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["directions_of", "site_of"]


def site_of(site: Site | str | None) -> Site | None:
    """A site from its name, or as it is.

    Args:
        site: such as ``resid_post.12``; None stays None.
    """
    return None if site is None else Site.of(site)


def directions_of(vector: SteeringVector, sites: Sequence[Site | str] | None) -> dict[Site, Tensor]:
    """Directions [d] of length 1 at the sites that are read.

    Args:
        vector: whose directions.
        sites: some of its sites; None takes all that have a direction.

    Raises:
        DataError: none of the sites has a direction.
    """
    method = method_of(vector)
    wanted = vector.reads if sites is None else [Site.parse(one) if isinstance(one, str) else one for one in sites]
    found = {site: read_direction(method, vector.params(site)) for site in wanted}
    kept = {site: unit(direction.float()) for site, direction in found.items() if direction is not None}
    if not kept or (sites is not None and len(kept) < len(found)):
        raise DataError(f"{vector.method} has no single direction to project on at {', '.join(map(str, found))}")
    return kept
