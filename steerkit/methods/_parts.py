"""TODO methods._parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steerkit.errors import SiteError
from steerkit.methods._protocols import Params
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site

__all__ = ["MatrixPart", "fits_width", "head_width_of", "head_widths", "neuron_width", "parts_of"]


class MatrixPart(NamedTuple):
    """What a vector holds of one matrix, or one stack of them, at a site.

    Attributes:
        prefix: of the names of its tensors.
        gate: [i] or [e, i].
        magnitude: [a] or [e, i].
    """

    prefix: str
    gate: Tensor
    magnitude: Tensor


def parts_of(params: Params) -> list[MatrixPart]:
    """The matrices that a vector edits at a site: the one there, or routed experts and a shared one."""
    empty = torch.empty(0)
    prefixes = [prefix for prefix in ("", "shared_") if not prefix or f"{prefix}gate" in params]
    return [
        MatrixPart(prefix, params.get(f"{prefix}gate", empty), params.get(f"{prefix}magnitude", empty))
        for prefix in prefixes
    ]


def fits_width(part: MatrixPart) -> bool:
    """Whether a gate has a magnitude for each of its components."""
    gate, magnitude = part.gate, part.magnitude
    if gate.dim() == 2:
        return not part.prefix and gate.numel() > 0 and gate.shape == magnitude.shape
    return (
        gate.dim() == magnitude.dim() == 1 and len(magnitude) > 0 and len(gate) > 0 and not len(gate) % len(magnitude)
    )


def head_widths(site: Site, magnitude: Tensor) -> list[tuple[str | int | float, ...]]:
    """The rows of a table that tell of one block's heads."""
    return [
        (site.layer, site.kind.partition("_")[0], f"head {head}", abs(size), "reinforce" if size > 0 else "suppress")
        for head, size in enumerate(magnitude.tolist())
        if size
    ]


def neuron_width(site: Site, part: MatrixPart) -> list[tuple[str | int | float, ...]]:
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


def head_width_of(decoder: Decoder, site: Site, inputs: int) -> int | None:
    """Columns of one head; None for an MLP.

    Raises:
        SiteError: the config tells no number of heads that fits.
    """
    if site.kind.startswith("mlp"):
        return None
    config = decoder.model.config.get_text_config()
    name = "linear_num_value_heads" if site.kind == "mixer_out" else "num_attention_heads"
    heads = getattr(config, name, None)
    if not isinstance(heads, int) or heads < 1 or inputs % heads:
        raise SiteError(f"{site}: the config's {name} is {heads!r}, which does not part {inputs} inputs into heads")
    return inputs // heads
