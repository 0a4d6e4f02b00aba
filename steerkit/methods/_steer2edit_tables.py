"""What a Steer2Edit vector changes, for people: a table of its heads and neurons, and heat maps of their magnitudes."""

from __future__ import annotations

import torch
from torch import Tensor

from steerkit.methods._protocols import HeatMap, PartsTable
from steerkit.methods._steer2edit_parts import MatrixPart, parts_of
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["edited_parts", "magnitude_maps"]


def edited_parts(vector: SteeringVector) -> PartsTable:
    """Every edited head, and the neurons of every layer by what is done to them, the largest change first.

    Args:
        vector: a vector of Steer2Edit.
    """
    rows: list[tuple[str | int | float, ...]] = []
    counts, idle = {"head": 0, "neuron": 0}, 0
    for site in vector.sites:
        params = vector.params(site)
        is_mlp = site.kind.startswith("mlp")
        idle += int((params["tokens"] == 0).any(dim=0).sum()) if "tokens" in params else 0
        for part in parts_of(params):
            counts["neuron" if is_mlp else "head"] += int(part.magnitude.count_nonzero())
            rows += _neuron_rows(site, part) if is_mlp else _head_rows(site, part.magnitude)
    title = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items() if count)
    note = "gate: length of its part of the gate at strength 1. reinforce: it writes along the direction already"
    if idle:
        note += f". {idle} expert{'' if idle == 1 else 's'} left alone: no token of one side was routed there"
    return PartsTable(
        f"{title} edited",
        ("layer", "block", "edited", "gate", "what"),
        sorted(rows, key=lambda row: -float(row[3])),
        note,
    )


def magnitude_maps(vector: SteeringVector) -> list[HeatMap]:
    """Heads in their order; neurons of each layer from the most reinforced to the most suppressed one.

    Args:
        vector: a vector of Steer2Edit.
    """
    heads: dict[int, list[float]] = {}
    neurons: dict[int, list[float]] = {}
    for site in vector.sites:
        magnitude = torch.cat([part.magnitude.flatten() for part in parts_of(vector.params(site))])
        if site.kind.startswith("mlp"):
            neurons[site.layer] = magnitude[magnitude != 0].sort(descending=True).values.tolist()
        else:
            heads[site.layer] = magnitude.tolist()
    words = "reinforce", "suppress"
    maps = [HeatMap("heads", "head", heads, *words)] if heads else []
    return maps + ([HeatMap("neurons", "rank among the edited neurons", neurons, *words)] if neurons else [])


def _head_rows(site: Site, magnitude: Tensor) -> list[tuple[str | int | float, ...]]:
    """The rows of a table that tell of one block's heads."""
    return [
        (site.layer, site.kind.partition("_")[0], f"head {head}", abs(size), "reinforce" if size > 0 else "suppress")
        for head, size in enumerate(magnitude.tolist())
        if size
    ]


def _neuron_rows(site: Site, part: MatrixPart) -> list[tuple[str | int | float, ...]]:
    """The rows of a table that tell of one block's neurons, or of those of its experts."""
    rows: list[tuple[str | int | float, ...]] = []
    for does, chosen in (("reinforce", part.magnitude > 0), ("suppress", part.magnitude < 0)):
        count = int(chosen.count_nonzero())
        if not count:
            continue
        where = "of the shared expert" if part.prefix else ""
        if chosen.dim() == 2:
            experts = int(chosen.any(dim=1).count_nonzero())
            where = f"of {experts} expert{'' if experts == 1 else 's'}"
        what = f"{count} neuron{'' if count == 1 else 's'} {where}".rstrip()
        size = float(torch.linalg.vector_norm(part.magnitude[chosen]))
        rows.append((site.layer, site.kind.partition("_")[0], what, size, does))
    return rows
