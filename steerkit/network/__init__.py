"""Where things are in a decoder; nothing in this room changes anything.

`decoder` finds the blocks, `sites` names the places, `tap` locates them, `anatomy` tells a block's two halves and its
norms by running it, `writers`, `linears` and `experts` find the weights that write to the residual stream.
"""

from __future__ import annotations

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
