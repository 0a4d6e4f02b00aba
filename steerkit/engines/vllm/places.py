"""Where in vLLM's model blocks and their halves are: found by structure, as vLLM keeps the names of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from steerkit.errors import SiteError
from steerkit.network.sites import Site

__all__ = ["Place", "places"]

# Where a family norms what a half adds, before it is added, the norm's output is what the half adds.
_BEHIND_MLP = {
    "post_feedforward_layernorm": "post_attention_layernorm",
    "post_mlp_layernorm": "post_self_attn_layernorm",
}


class Place(NamedTuple):
    """A module whose output is written.

    Attributes:
        site: what its output is.
        module: the module.
    """

    site: Site
    module: nn.Module


def places(
    model: nn.Module, count: int, kinds: Sequence[str], has_attention: Callable[[nn.Module], bool]
) -> list[Place]:
    """Find all places of some kinds in the blocks that this process holds.

    Args:
        model: vLLM's.
        count: blocks that its config says.
        kinds: of the sites.
        has_attention: whether a module holds a layer that keeps keys and values.

    Raises:
        SiteError: the blocks, or a half of one, cannot be told.
    """
    found = []
    for layer, block in enumerate(_blocks(model, count, has_attention)):
        if not has_attention(block) and not list(block.children()):
            continue  # stands for a block of another pipeline stage
        halves = _halves(layer, block, has_attention) if set(kinds) - {"resid_post"} else {}
        found += [Place(Site(layer, kind), {"resid_post": block, **halves}[kind]) for kind in kinds]
    return found


def _blocks(model: nn.Module, count: int, has_attention: Callable[[nn.Module], bool]) -> nn.ModuleList:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and any(map(has_attention, module))
    }
    text = {name: module for name, module in lists.items() if "vision" not in name and "visual" not in name} or lists
    if len(text) != 1:
        names = ", ".join(text) or "none"
        raise SiteError(f"{type(model).__name__}: {count} blocks are wanted in one list of modules, found {names}")
    return next(iter(text.values()))


def _halves(layer: int, block: nn.Module, has_attention: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """The modules whose outputs attention and MLP add to the stream."""
    children = dict(block.named_children())
    attention = [name for name, child in children.items() if has_attention(child)]
    # A norm has no parts. Weights tell less: on CPUs vLLM repacks matrices, and leaves empty ones behind.
    others = [name for name, child in children.items() if name not in attention and list(child.children())]
    if len(attention) != 1 or len(others) != 1:
        raise SiteError(
            f"block {layer} ({type(block).__name__}): one attention and one MLP are wanted, found "
            f"{', '.join(attention) or 'none'} and {', '.join(others) or 'none'}; start with kinds ['resid_post']"
        )
    names = {"attn_out": attention[0], "mlp_out": others[0]}
    for behind_mlp, behind_attention in _BEHIND_MLP.items():
        if behind_mlp in children and behind_attention in children:
            names = {"attn_out": behind_attention, "mlp_out": behind_mlp}
    return {kind: children[name] for kind, name in names.items()}
