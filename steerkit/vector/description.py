"""What a vector says about itself, and at each site: shapes, norms, and its strength in both units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steerkit.network.sites import Site
from steerkit.vector.container import FORMAT, LAYER_COUNTING
from steerkit.vector.fields import CODECS
from steerkit.vector.frozen import json_like
from steerkit.vector.tensors import Stored, direction_length

if TYPE_CHECKING:
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["described", "described_site", "strength_source"]


def described(vector: SteeringVector, params: Mapping[Site, Mapping[str, Stored]]) -> dict[str, Any]:
    """See `SteeringVector.describe`.

    Args:
        vector: the vector.
        params: its tensors at each of its sites.
    """
    apart = ("sites", "norms", "spreads", "massive", "widths", "fitted_at")
    facts = {name: json_like(getattr(vector, name)) for name in CODECS if name not in apart}
    return {
        **facts,
        "format": FORMAT,
        "digest": vector.digest,
        "layer_counting": LAYER_COUNTING,
        "strength": json_like(vector.strength),
        "sites": [described_site(vector, site, params[site]) for site in vector.sites],
        "fitted_at": [str(site) for site in vector.reads],
    }


def described_site(vector: SteeringVector, site: Site, params: Mapping[str, Stored]) -> dict[str, Any]:
    """The facts of a vector at one site, as JSON can hold them.

    Args:
        vector: the vector.
        site: one of its sites.
        params: its tensors there.

    Returns:
        The site's width; by parameter its dtype and shape; the direction's norm, the activation norm, the share of the
        direction that the projection behind heads or neurons sees, and, for edits that add a direction, the strength in
        both units (the one set, else the suggested one).
    """
    length, norm = direction_length(params.get("direction")), vector.typical(site)
    given = vector.strength if vector.strength is not None else vector.suggested_strength
    adds = vector.edit.startswith("add")
    strengths: dict[str, Any] = {"paper": None, "norm": None}
    strengths[vector.unit] = json_like(given)
    if adds and length and norm and given is not None:
        factor = length / norm if vector.unit == "paper" else norm / length
        values = strengths[vector.unit]
        other = "norm" if vector.unit == "paper" else "paper"
        strengths[other] = [value * factor for value in values] if isinstance(values, list) else values * factor
    return {
        "site": str(site),
        "width": vector.widths.get(site, vector.hidden_size),
        "params": {name: [one.dtype, list(one.shape)] for name, one in sorted(params.items())},
        "direction_norm": length,
        "activation_norm": vector.norms.get(site),
        "spread": vector.spreads.get(site),
        "seen_share": vector.extra.get("seen_share", {}).get(str(site)),
        "massive": {str(place): share for place, share in vector.massive.get(site, {}).items()},
        "strength": strengths,
    }


def strength_source(vector: SteeringVector) -> str:
    """Where the suggested strength comes from, in a few words.

    Args:
        vector: the vector.
    """
    facts = vector.calibration
    if vector.suggested_strength is None:
        return "none is suggested"
    if facts.get("by") == "suggest_strength":
        cost = f"KL {facts['kl']:.2g} on neutral texts" if "kl" in facts else "which the file does not name"
        return f"by its cost alone ({cost}), not confirmed"
    if facts.get("by") == "calibrate":
        return "calibrated, confirmed on held-out items" if facts.get("confirmed") else "calibrated, not confirmed"
    return "suggested by the recipe" if vector.recipe is not None else "suggested by the file"
