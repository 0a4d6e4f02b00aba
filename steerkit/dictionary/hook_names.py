"""From what other libraries call a place in the model, and from their folders' names, to a site.

    TransformerLens   blocks.12.hook_resid_post, .hook_resid_pre, .hook_mlp_out, .hook_attn_out, .attn.hook_z,
                      .mlp.hook_post
    transformers      layers.12, model.layers.12, transformer.h.12 (a block's output), ....mlp, ....self_attn
    Gemma Scope       gemma-scope-2b-pt-res/layer_12/..., -mlp, -att, -transcoders
    Llama Scope       Llama3_1-8B-Base-L12R-8x with R residual, M MLP, A attention's output, TC transcoder

TransformerLens's attn_out and mlp_out are what attention and MLP add to the stream, after a post-norm where there is
one, as steerkit's are. Its hook_z is [heads, head width], which lie side by side in `z`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from steerkit.network.sites import Site

__all__ = ["site_of_hook", "site_of_module"]

_HOOKS: Mapping[str, str] = MappingProxyType(
    {
        "hook_resid_post": "resid_post",
        "hook_resid_pre": "resid_pre",
        "hook_mlp_out": "mlp_out",
        "hook_attn_out": "attn_out",
        "attn.hook_z": "z",
        "mlp.hook_post": "mlp_post",
    }
)
_MODULES: Mapping[str, str] = MappingProxyType(
    {"": "resid_post", "mlp": "mlp_raw", "self_attn": "attn_raw", "attn": "attn_raw", "attention": "attn_raw"}
)


def site_of_hook(name: str) -> Site | None:
    """The site of a hook point of TransformerLens.

    Args:
        name: such as ``"blocks.12.hook_resid_post"``.

    Returns:
        The site; None where it is another place.

    Example:
        >>> site_of_hook("blocks.3.attn.hook_z")
        Site(layer=3, kind='z')
    """
    match = re.fullmatch(r"blocks\.([0-9]+)\.(.+)", name)
    kind = None if match is None else _HOOKS.get(match[2])
    return None if match is None or kind is None else Site(int(match[1]), kind)


def site_of_module(name: str) -> Site | None:
    """The site of what a module of a transformers model gives.

    Args:
        name: such as ``"model.layers.12"`` or ``"layers.12.mlp"``.

    Returns:
        The site; None where it is another place.

    Example:
        >>> site_of_module("layers.12.mlp")
        Site(layer=12, kind='mlp_raw')
    """
    match = re.fullmatch(r"(?:[a-z_]+\.)*(?:layers|h|blocks)\.([0-9]+)(?:\.([a-z_]+))?", name)
    kind = None if match is None else _MODULES.get(match[2] or "")
    return None if match is None or kind is None else Site(int(match[1]), kind)
