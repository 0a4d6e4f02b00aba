"""Where things are in a decoder; nothing in this room changes anything.

`decoder` finds the blocks, `sites` names the places, `tap` locates them. `anatomy` tells a block's two halves and its
norms by running it (`block_trace`, `structure`, `halves`, `residual_sum`). `linears` and `experts` are what writes at a
site, `writers` finds every weight that writes to the residual stream, `weight_digests` tells weights apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerkit._support.lazy import lazily

if TYPE_CHECKING:
    from steerkit.network.decoder import Decoder, execution_device, find_decoder, inner_model
    from steerkit.network.sites import Site, layers_text, parse_layers, sites_text
    from steerkit.network.tap import Tap, anatomies, locate

__all__ = [
    "Decoder",
    "Site",
    "Tap",
    "anatomies",
    "execution_device",
    "find_decoder",
    "inner_model",
    "layers_text",
    "locate",
    "parse_layers",
    "sites_text",
]

__getattr__ = lazily(
    __name__,
    {
        "Decoder": "decoder",
        "Site": "sites",
        "Tap": "tap",
        "anatomies": "tap",
        "execution_device": "decoder",
        "find_decoder": "decoder",
        "inner_model": "decoder",
        "layers_text": "sites",
        "locate": "tap",
        "parse_layers": "sites",
        "sites_text": "sites",
    },
)
