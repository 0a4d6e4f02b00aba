"""Site: where in the network; finds the module in any decoder, reads and writes its tensor.

    resid_pre.l ──┬─> norm ─ attn_in ─> attention ─ attn_raw ─> (norm) ─ attn_out ─┐
                  └───────────────────────────────────────────────────────────────(+)─┐
                  ┌───────────────────────────────────────────────────────────────────┘
                  ├─> norm ─ mlp_in ─> MLP ─ mlp_raw ─> (norm) ─ mlp_out ─┐
                  └──────────────────────────────────────────────────────(+)─> resid_post.l = resid_pre.(l+1)

Inside attention, `z` is what its output projection reads; inside the MLP, `mlp_post` is what its down projection reads.
Layers count blocks from 0. The blocks are the one module list inside the decoder body that is as long as the text
config says; the modules inside a block are found by running it (`anatomy.py`), never by their names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from steerkit.anatomy import Anatomy
from steerkit.errors import SiteError, near_miss
from steerkit.probe_block import argument_of, probe_blocks, tensor_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "KINDS",
    "KIND_HELP",
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

KIND_HELP: Mapping[str, str] = MappingProxyType(
    {
        "resid_pre": "the residual stream as the block reads it",
        "resid_post": "the residual stream as the block leaves it",
        "attn_in": "the output of the norm that only attention reads",
        "attn_out": "what attention adds to the residual stream, after a post-norm where there is one",
        "attn_raw": "attention's output before its post-norm; attn_out where there is none",
        "mlp_in": "the output of the norm that only the MLP reads",
        "mlp_out": "what the MLP adds to the residual stream, after a post-norm where there is one",
        "mlp_raw": "the MLP's output before its post-norm; mlp_out where there is none",
        "block_in": "the output of the one norm that feeds the whole block",
        "z": "the input of attention's output projection: the heads side by side",
        "mlp_post": "the input of the MLP's down projection: its neurons",
        "mixer_out": "what a state-space or linear-attention module adds to the residual stream",
    }
)
KINDS: tuple[str, ...] = tuple(KIND_HELP)


@dataclass(frozen=True, order=True)
class Site:
    """A place in the network, such as `resid_post.12`.

    Attributes:
        layer: index of the block, from 0.
        kind: one of `KINDS`.

    Raises:
        SiteError: an unknown kind, or a layer that is not a whole number from 0.

    Example:
        >>> str(Site(12)), Site.parse("mlp_out.3")
        ('resid_post.12', Site(layer=3, kind='mlp_out'))
    """

    layer: int
    kind: str = "resid_post"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SiteError(f"unknown kind of site {self.kind!r}; {near_miss(self.kind, KINDS)}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise SiteError(f"{self.kind}.{self.layer}: a layer is a whole number from 0, not {self.layer!r}")

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read the text form, `<kind>.<layer>`.

        Args:
            text: such as ``"resid_post.12"``.

        Raises:
            SiteError: the text has another form, or names an unknown kind.
        """
        kind, dot, layer = text.strip().partition(".")
        if not dot or re.fullmatch("[0-9]+", layer) is None:
            raise SiteError(f"{text!r} is not a site; write <kind>.<layer>, such as resid_post.12")
        return cls(int(layer), kind)

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"


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


@dataclass(frozen=True)
class Tap:
    """Where a site's tensor is read and written in one model.

    Attributes:
        site: the canonical site.
        module: the module to hook.
        name: its name inside the inner model.
        side: whether the tensor is what the module reads or what it gives.
        flat: whether the tensor is `[b*t, width]` there instead of `[b, t, width]` (OPT's MLP).
        width: its last dimension.
    """

    site: Site
    module: nn.Module
    name: str
    side: Literal["input", "output"]
    flat: bool
    width: int

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any = None) -> Tensor:
        """The tensor, from what a hook was given.

        Args:
            args: the module's positional arguments.
            kwargs: its keyword arguments.
            output: what it gave, for a tap on the output.

        Returns:
            `[b, t, width]`, or `[b*t, width]` where `flat`; the object itself, not a copy.

        Raises:
            SiteError: there is no tensor where one was found before.
        """
        tensor = argument_of(args, kwargs) if self.side == "input" else tensor_of(output)
        if not isinstance(tensor, Tensor):
            raise SiteError(f"{self.site}: the {self.side} of {self.name} is {type(tensor).__name__}, not a tensor")
        return tensor

    def write_input(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the tensor replaced; what was given is left alone.

        Args:
            args: the module's positional arguments.
            kwargs: its keyword arguments.
            value: the new tensor, of the old one's shape.

        Returns:
            What a pre-hook with keyword arguments returns.
        """
        if args:
            return (value, *args[1:]), dict(kwargs)
        return args, {**kwargs, "hidden_states": value}

    def write_output(self, output: Any, value: Tensor) -> Any:
        """The output with the tensor replaced, of the same type; what was given is left alone.

        Args:
            output: a tensor, or a tuple, a list or a ModelOutput that starts with it.
            value: the new tensor, of the old one's shape.

        Returns:
            What a forward hook returns.
        """
        if isinstance(output, Mapping):
            changed = {**output, next(iter(output)): value}
            return type(output)(**changed) if dataclasses.is_dataclass(output) else type(output)(changed)  # type: ignore[call-arg]
        if isinstance(output, tuple) and hasattr(output, "_replace"):
            return output._replace(**{output._fields[0]: value})  # type: ignore[attr-defined]
        if isinstance(output, (tuple, list)):
            return type(output)((value, *output[1:]))
        return value


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
    if _is_encoder(inner, body):
        raise SiteError(f"{owner} is an encoder, its attention is not causal; pass a causal language model")
    if all(parameter.is_meta for parameter in inner.parameters()) and not _is_dispatched(inner):
        raise SiteError(f"{owner} has no weights: all parameters are on the meta device; load it with from_pretrained")
    blocks = _find_blocks(body, getattr(text, "num_hidden_layers", None), owner)
    path = next(name for name, module in inner.named_modules() if module is blocks)
    return Decoder(inner, body, blocks, path, len(blocks), text.hidden_size, config.model_type)


def _is_encoder(inner: Any, body: nn.Module) -> bool:
    """Whether no attention module is causal by its own word; where none says, the config and the class do."""
    flags = [module.is_causal for module in body.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if flags:
        return not any(flags)
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


def _find_blocks(body: nn.Module, num_layers: int | None, owner: str) -> nn.ModuleList:
    """The one module list of the length that the config says, not counting lists inside such a list.

    Raises:
        SiteError: there is none, there are several, or one block stands in it twice.
    """
    lists = {name: module for name, module in body.named_modules() if isinstance(module, nn.ModuleList)}
    fits = {name: module for name, module in lists.items() if len(module) == num_layers}
    outer = [name for name in fits if not any(name.startswith(f"{other}.") for other in fits)]
    if not outer:
        found = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
        raise SiteError(f"the config of {owner} says {num_layers} blocks, but its module lists are: {found}")
    if len(outer) > 1:
        raise SiteError(
            f"{owner} has {len(outer)} lists of {num_layers} modules: {', '.join(outer)}; which are blocks?"
        )
    blocks = fits[outer[0]]
    if len({id(block) for block in blocks}) < len(blocks):
        raise SiteError(f"{owner} uses one block for several layers of {outer[0]}, so a layer cannot be told apart")
    return blocks


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


def locate(model: nn.Module, sites: Iterable[Site]) -> dict[Site, Tap]:
    """Find the modules and tensors of some sites.

    Every kind but resid_pre and resid_post takes one forward pass over three tokens, up to the deepest block asked.

    Args:
        model: as for `find_decoder`.
        sites: the places asked for.

    Returns:
        Taps by canonical site, in the order asked; attn_raw and mlp_raw become attn_out and mlp_out where they are the
        same tensor.

    Raises:
        SiteError: a layer outside the model, or a kind that a block does not have; the message says what it has.
    """
    decoder = find_decoder(model)
    asked = list(sites)
    owner = type(decoder.model).__name__
    for site in asked:
        if site.layer >= decoder.num_layers:
            last = decoder.num_layers - 1
            where = f"layer {site.layer} is outside 0..{last} of {owner} ({decoder.num_layers} layers)"
            raise SiteError(f"{site}: {where}")
    found = anatomies(decoder, {site.layer for site in asked if not site.kind.startswith("resid_")})
    taps = {}
    for site in asked:
        name = f"{decoder.path}.{site.layer}"
        if site.kind.startswith("resid_"):
            side: Literal["input", "output"] = "input" if site.kind == "resid_pre" else "output"
            tap = Tap(site, decoder.blocks[site.layer], name, side, flat=False, width=decoder.hidden_size)
        else:
            place = found[site.layer].find(site.kind)
            canonical = Site(site.layer, place.kind)
            tap = Tap(canonical, place.module, f"{name}.{place.name}", place.side, place.flat, place.width)
        taps[tap.site] = tap
    return taps


def anatomies(decoder: Decoder, layers: set[int]) -> dict[int, Anatomy]:
    """Run the decoder body over three tokens and read off the roles in some blocks.

    Args:
        decoder: the model's decoder.
        layers: the blocks, counted from 0.

    Returns:
        By layer what stands where in it.

    Raises:
        SiteError: the body fails on plain token ids, or a block did not run.
    """
    if not layers:
        return {}
    input_ids = torch.tensor([[1, 2, 3]], device=execution_device(decoder))
    with contextlib.ExitStack() as stack:
        for hook in decoder.model._forward_pre_hooks.values():
            if hasattr(hook, "suspended"):  # the pass clock of an outer `steer`: the probe is no pass of the user's
                stack.enter_context(hook.suspended())
        traces = probe_blocks(decoder.body, {layer: decoder.blocks[layer] for layer in sorted(layers)}, input_ids)
    types = getattr(decoder.model.config.get_text_config(), "layer_types", None)
    owner = type(decoder.model).__name__
    return {
        layer: Anatomy(trace, layer, owner, types[layer] if types is not None else None)
        for layer, trace in traces.items()
    }


def layers_text(layers: Sequence[int]) -> str:
    """A rising set of layers in little room: ``8+12-20``.

    Args:
        layers: blocks counted from 0.
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "+".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else "+".join(map(str, run)) for run in runs)


def sites_text(sites: Iterable[str]) -> str:
    """Sites in little room, kinds at the same layers together: ``attn_in, mlp_in 15+17-24``.

    Args:
        sites: their text forms, in any order.
    """
    layers: dict[str, list[int]] = {}
    for site in map(Site.parse, sites):
        layers.setdefault(site.kind, []).append(site.layer)
    kinds: dict[str, list[str]] = {}
    for kind, found in layers.items():
        kinds.setdefault(layers_text(sorted(found)), []).append(kind)
    return "; ".join(f"{', '.join(names)} {where}" for where, names in kinds.items())


def parse_layers(layers: str | Sequence[int], num_layers: int) -> list[int]:
    """Read a choice of layers.

    Args:
        layers: ``"10-14"`` (both ends included), ``"11,13"``, ``"0-2,7"`` or a list of indices.
        num_layers: how many blocks the model has.

    Returns:
        The indices, in the order given, each once.

    Raises:
        SiteError: a value that is not such a choice, or outside the model.

    Example:
        >>> parse_layers("10-12,3", 30)
        [10, 11, 12, 3]
    """
    allowed = f"layers go from 0 to {num_layers - 1}"
    chosen: list[int] = []
    for part in layers.split(",") if isinstance(layers, str) else layers:
        if isinstance(part, int) and not isinstance(part, bool):
            first = last = part
        else:
            match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part) if isinstance(part, str) else None
            if match is None:
                raise SiteError(f"{part!r} is no layer; {allowed}; write 10-14 or 11,13")
            first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise SiteError(f"layers {first}-{last} run backwards; write {last}-{first}")
        if first < 0 or last >= num_layers:
            outside = first if first < 0 else last
            raise SiteError(f"layer {outside} is outside the model; {allowed}")
        chosen.extend(range(first, last + 1))
    if not chosen:
        raise SiteError(f"no layers were given; {allowed}")
    return list(dict.fromkeys(chosen))
