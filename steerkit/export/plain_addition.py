"""What a plain addition adds at each block, for programs that add one direction at block outputs, at every token."""

from __future__ import annotations

import torch
from torch import Tensor

from steerkit.errors import ScopeError, SiteError, StrengthError, VectorFileError
from steerkit.methods._registry import can_write_all, default_strength
from steerkit.network.sites import Site
from steerkit.vector.applying import varying
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["added_everywhere"]


def added_everywhere(vector: SteeringVector, program: str, *, strength: float | None = None) -> dict[int, Tensor]:
    """What a program of that kind has to add at each block, the strength included.

    Args:
        vector: a plain addition at block outputs, with scope `all`.
        program: what messages call it.
        strength: in the vector's unit; None takes the vector's own, else its suggested one, else 1.

    Returns:
        block to [d] float32, in the order of the blocks.

    Raises:
        VectorFileError: the vector is no plain addition of one direction per site.
        SiteError: a site other than a block's output.
        ScopeError: the scope is not `all`.
        StrengthError: the strength is not one finite number, or of a unit that cannot be converted.
    """
    if vector.edit != "add":
        raise VectorFileError(
            f"{program} only adds a direction, this vector's edit is {vector.edit!r}; steer with hooks instead"
        )
    if vector.scope != "all":
        advice = (
            "accept that with vector.at(scope='all') or --scope all" if can_write_all(vector) else "steer with hooks"
        )
        raise ScopeError(f"{program} adds at every token, the vector only at '{vector.scope}'; {advice}")
    if changing := varying(vector):
        raise StrengthError(f"{program} adds the same at every token, which this is not ({changing})")
    for site in vector.sites:
        _check(site, vector, program)
    strengths = _strengths(vector, strength)
    return {site.layer: _shift(vector, site, strengths[site]) for site in sorted(vector.sites)}


def _check(site: Site, vector: SteeringVector, program: str) -> None:
    """Refuse what cannot be said as one direction added at a block's output.

    Raises:
        SiteError: not the output of a block.
        VectorFileError: not one direction [hidden_size].
    """
    if site.kind != "resid_post":
        raise SiteError(f"{site}: {program} adds at block outputs only; fit at resid_post, or steer with hooks")
    direction = vector.params(site).get("direction")
    shape = None if direction is None else list(direction.shape)
    if shape != [vector.hidden_size]:
        raise VectorFileError(
            f"{site}: {program} adds one direction of shape [{vector.hidden_size}], the vector has {shape or 'none'}"
        )


def _strengths(vector: SteeringVector, strength: float | None) -> dict[Site, float]:
    """The strength at each site in the paper unit.

    Raises:
        StrengthError: several strengths, one not finite, none at all, or no activation norm to convert with.
    """
    used = vector.at(strength=strength)
    if used.strength is None:
        used = used.at(strength=default_strength(vector))
    if isinstance(used.strength, tuple):
        raise StrengthError(f"got {len(used.strength)} strengths, one per row; the file holds one")
    strengths: dict[Site, float] = {}
    for entry in used.describe()["sites"]:
        if entry["strength"]["paper"] is None:
            raise StrengthError(
                f"{entry['site']}: the vector file holds no norm to convert unit 'norm' with; "
                "give a strength in unit 'paper' (vector.at(strength=..., unit='paper'))"
            )
        strengths[Site.parse(entry["site"])] = entry["strength"]["paper"]
    return strengths


def _shift(vector: SteeringVector, site: Site, strength: float) -> Tensor:
    """`strength * direction` [d] in float32, whatever the dtype of either.

    Raises:
        StrengthError: it is too large for float32.
    """
    shift = torch.tensor(strength, dtype=torch.float32) * vector.params(site)["direction"].float()
    if not bool(torch.isfinite(shift).all()):
        raise StrengthError(f"{site}: strength {strength:g} is too large for float32; give a smaller one")
    return shift
