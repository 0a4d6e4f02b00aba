"""Site: where in the network; finds the module in any decoder, reads and writes its tensor.

    resid_pre.l ──┬─> norm ─ attn_in ─> attention ─ attn_raw ─> (norm) ─ attn_out ─┐
                  └───────────────────────────────────────────────────────────────(+)─┐
                  ┌───────────────────────────────────────────────────────────────────┘
                  ├─> norm ─ mlp_in ─> MLP ─ mlp_raw ─> (norm) ─ mlp_out ─┐
                  └──────────────────────────────────────────────────────(+)─> resid_post.l = resid_pre.(l+1)

Inside attention, `z` is what its output projection reads; inside the MLP, `mlp_post` is what its down projection reads.
Layers count blocks from 0. The blocks are the one module list inside the decoder body that is as long as the text
config says, or that has as many cache slots, where a block has several (LongCat-Flash); the modules inside a block are
found by running it (`anatomy.py`), never by their names.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from steerkit.errors import SiteError
from steerkit.tokens.transformers_facts import cache_slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Decoder", "execution_device", "find_decoder", "inner_model"]


@dataclass(frozen=True)
class Decoder:
    """The text decoder inside a model.

    Attributes:
        model: the transformers model inside any wrappers.
        body: what `get_decoder()` gives: embeddings and blocks, no head.
        blocks: its list of blocks.
        path: the name of `blocks` inside `model`, such as ``"model.layers"``.
        num_layers: how many blocks there are.
        hidden_size: width of the residual stream.
        model_type: the config's name of the family.
    """

    model: PreTrainedModel
    body: PreTrainedModel
    blocks: nn.ModuleList
    path: str
    num_layers: int
    hidden_size: int
    model_type: str

    @property
    def entry(self) -> nn.Module:
        """What a pass has to begin with: the body, or the whole model where FSDP gathers weights when it is called."""
        module = sys.modules.get("torch.distributed.fsdp")
        kind: Any = getattr(module, "FSDPModule", ())
        entry: nn.Module = self.model if isinstance(self.model, kind) else self.body
        return entry


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, a compiled module or DistributedDataParallel; else the model itself.

    Args:
        model: any module.
    """
    outer: Any = model
    if isinstance(outer, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return inner_model(outer.module)
    if hasattr(outer, "_orig_mod"):  # torch.compile
        return inner_model(outer._orig_mod)
    if hasattr(outer, "get_base_model") and outer.get_base_model() is not outer:  # peft
        return inner_model(outer.get_base_model())
    return model


def find_decoder(model: nn.Module) -> Decoder:
    """Find the text decoder and its blocks.

    Args:
        model: a causal language model of transformers, or a vision-language model around one; wrapped or not.

    Raises:
        SiteError: an encoder, an encoder-decoder, no transformers model, no weights, or no one list of blocks.
    """
    inner: Any = inner_model(model)
    owner = type(inner).__name__
    config: Any = getattr(inner, "config", None)
    if not hasattr(inner, "get_decoder") or not hasattr(config, "get_text_config"):
        raise SiteError(f"{owner} has no get_decoder(); pass a causal language model of transformers")
    if config.is_encoder_decoder:
        raise SiteError(f"{owner} is an encoder-decoder; only decoders can be steered, such as LlamaForCausalLM")
    text = config.get_text_config()
    body = inner.get_decoder()
    if not hasattr(body, "get_input_embeddings"):  # ModernBERT calls its head a decoder
        body = inner.base_model
    if _is_encoder(inner, body):
        raise SiteError(
            f"{owner} is an encoder, or sees its whole prompt: it is not causal; pass a causal language model"
        )
    if all(parameter.is_meta for parameter in inner.parameters()) and not _is_dispatched(inner):
        raise SiteError(f"{owner} has no weights: all parameters are on the meta device; load it with from_pretrained")
    blocks = _find_blocks(body, getattr(text, "num_hidden_layers", None) or 0, owner)
    path = next(name for name, module in inner.named_modules() if module is blocks)
    return Decoder(inner, body, blocks, path, len(blocks), text.hidden_size, config.model_type)


def _is_encoder(inner: Any, body: nn.Module) -> bool:
    """Whether no attention module is causal by its own word; where none says, the config and the class do."""
    said = False
    for module in body.modules():
        flag = getattr(module, "is_causal", None)
        if flag is True:
            return False
        said = said or flag is False
    if said:
        return True
    if not inner.can_generate():
        return True
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    # The flag alone is not enough: GPT-NeoX-Japanese has it at False and is causal.
    return (
        not getattr(inner.config, "is_decoder", True) and inner.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def _is_dispatched(inner: nn.Module) -> bool:
    """Whether accelerate brings the weights in when they are needed."""
    return any(hasattr(module, "_hf_hook") for module in inner.modules())


_CACHE_SLOTS = "; if it counts cache slots of blocks that run several times in a pass, no block is one layer"


def _find_blocks(body: nn.Module, num_layers: int, owner: str) -> nn.ModuleList:
    """The one module list of the length that the config says, not counting lists inside such a list.

    Raises:
        SiteError: there is none, there are several, or one block stands in it twice.
    """
    lists = _module_lists(body, num_layers)
    fits = {name: module for name, module in lists.items() if len(module) == num_layers}
    if not fits and num_layers > 0:  # the config may count cache slots
        fits = {name: module for name, module in lists.items() if cache_slots(module) == set(range(num_layers))}
    outer = [name for name in fits if not any(name.startswith(f"{other}.") for other in fits)]
    if not outer:
        found = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
        if not num_layers:
            raise SiteError(
                f"the config of {owner} has no number of blocks, and its module lists are: {found}; where several "
                "stacks run after one another, there is no one residual stream to be steered"
            )
        if any(0 < len(one) < num_layers and num_layers % len(one) == 0 for one in lists.values()):
            found += _CACHE_SLOTS
        raise SiteError(f"the config of {owner} says {num_layers} blocks, but its module lists are: {found}")
    if len(outer) > 1:  # towers for images or sound may be as deep; they are modules of their own inside the body
        outer = [name for name in outer if "." not in name] or outer
    if len(outer) > 1:
        raise SiteError(
            f"{owner} has {len(outer)} lists of {num_layers} modules: {', '.join(outer)}; which are blocks?"
        )
    blocks = fits[outer[0]]
    if len({id(block) for block in blocks}) < len(blocks):
        raise SiteError(f"{owner} uses one block for several layers of {outer[0]}, so a layer cannot be told apart")
    return blocks


def _module_lists(module: nn.Module, num_layers: int, prefix: str = "") -> dict[str, nn.ModuleList]:
    """The lists inside a module by name, each once; those inside a list of the length asked are not looked for."""
    found: dict[str, nn.ModuleList] = {}
    for name, child in module.named_children():
        inside: dict[str, nn.ModuleList] = {}
        if isinstance(child, nn.ModuleList):
            inside[f"{prefix}{name}"] = child
        if not (inside and len(inside[f"{prefix}{name}"]) == num_layers):
            inside |= _module_lists(child, num_layers, f"{prefix}{name}.")
        known = {id(one) for one in found.values()}
        found |= {path: one for path, one in inside.items() if id(one) not in known}
    return found


def execution_device(decoder: Decoder) -> torch.device:
    """Where token ids go: the embedding's execution device under accelerate, else its weight's.

    Args:
        decoder: the model's decoder.
    """
    embedding = decoder.body.get_input_embeddings()
    # An offloaded weight is on the meta device between passes; accelerate knows where it will be.
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if device is None:
        device = next(embedding.parameters()).device
    return torch.device(device)
