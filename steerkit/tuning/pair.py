"""`Pair`: a finetuned model and the model it was made of, whose blocks read the finetuned stream.

    x_0 = finetuned embeddings,   x_{l+1} = x_l + PTC_l + FTC_l
    PTC_l = f_base(x_l) - x_l     what the base block adds
    FTC_l = f_tuned(x_l) - f_base(x_l)

Where finetuning is an adapter there is no second model: each block runs a second time with its adapters off.

Nuti, Franzmeyer, Henriques (2025), "TuCo: Measuring the Contribution of Fine-Tuning to Individual Responses of LLMs".
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import ModelError
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import Decoder, execution_device, find_decoder, inner_model
from steerkit.network.sites import Site
from steerkit.network.tap import Tap, locate
from steerkit.tokens.clock import Hook
from steerkit.tokens.transformers_facts import CACHE_ARGUMENTS
from steerkit.tuning.second_cache import check_recurrent_state, follow, second_of

__all__ = ["Combine", "Pair"]

Combine = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]
"""From a block's number, what it read, what the base block made of it and what it made of it, each [b, t, d], to what
flows on; None leaves it."""

_FACTS = ("vocab_size", "rope_parameters", "rope_theta", "sliding_window", "layer_types")


class Pair:
    """A finetuned model beside its base.

    Args:
        model: the finetuned transformers model, or a PEFT model.
        base: the model before finetuning; None switches the adapters of `model` off.

    Raises:
        ModelError: `base` is None and `model` has no adapter, or a merged one; both are one object; they differ in
            depth, width, vocabulary, rotary positions or the shape of a weight in a block; or they lie on different
            devices.
        SiteError: a model is no decoder, or its residual stream is not one vector for each token.
    """

    def __init__(self, model: nn.Module, base: nn.Module | None) -> None:
        self.model = model
        self.decoder: Decoder = find_decoder(model)
        self._adapters = [] if base is not None else _adapters(self.decoder)
        self._base = None if base is None else find_decoder(base)
        if self._base is not None:
            _check_alike(self.decoder, self._base)
        last = self.decoder.num_layers - 1
        sites = [Site(layer, "resid_post") for layer in range(last + 1)]
        self.taps: tuple[Tap, ...] = tuple(locate(model, sites)[site] for site in sites)

    @contextlib.contextmanager
    def hooked(self, combine: Combine) -> Iterator[None]:
        """Run each block of the base beside that of the model, on what that one reads.

        Args:
            combine: what flows on of the two.

        Yields:
            Nothing.

        Raises:
            ModelError: the model runs in such a context already.
        """
        if any(isinstance(hook, _Behind) for hook in self.decoder.blocks[0]._forward_hooks.values()):
            raise ModelError("this model runs beside its base already; leave that context first")
        second = _Second()
        with contextlib.ExitStack() as stack:
            for layer, block in enumerate(self.decoder.blocks):
                before = block.register_forward_pre_hook(_Before(second, layer), with_kwargs=True)
                stack.callback(before.remove)
                # Before all other hooks, which change what flows on from both.
                hook = _Behind(self, second, layer, combine)
                stack.callback(block.register_forward_hook(hook, with_kwargs=True, prepend=True).remove)
            if self._base is not None:
                stack.enter_context(evaluation_mode(self._base.body))
            if "torch._dynamo" in sys.modules:  # a compiled block calls no hooks that it has not seen
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def of_base(self, layer: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the base block makes of the arguments that the finetuned one got, hooks of both left out.

        Args:
            layer: the block.
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        if self._base is not None:
            return self._base.blocks[layer].forward(*args, **kwargs)
        with _switched_off(self._adapters[layer]):
            return self.decoder.blocks[layer].forward(*args, **kwargs)


class _Second:
    """What the base blocks get in the place of what the finetuned ones write into: caches, and shared mappings."""

    def __init__(self) -> None:
        self._mappings: dict[int, tuple[Any, Any]] = {}

    def begin(self, layer: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at the arguments of a block before it runs."""
        from transformers.cache_utils import Cache

        check_recurrent_state(dict(kwargs), CACHE_ARGUMENTS, Cache)
        if layer == 0:
            self._mappings.clear()
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                if layer == 0 or not hasattr(value, "_steerkit_second"):
                    follow(value)
            elif isinstance(value, dict) and id(value) not in self._mappings:
                # Blocks that share keys and values hand them on in one. It is kept, so that its id stays its own.
                self._mappings[id(value)] = value, copy.copy(value)

    def of(self, value: Any) -> Any:
        """What a base block gets for an argument."""
        from transformers.cache_utils import Cache

        if isinstance(value, Cache):
            return second_of(value)
        return self._mappings[id(value)][1] if isinstance(value, dict) else value


class _Before(Hook):
    """Sees what a block is given before it runs."""

    def __init__(self, second: _Second, layer: int) -> None:
        self._second, self._layer = second, layer

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._second.begin(self._layer, args, kwargs)


class _Behind(Hook):
    """Runs the base block behind the finetuned one and puts the two together."""

    def __init__(self, pair: Pair, second: _Second, layer: int, combine: Combine) -> None:
        self._pair, self._second, self._layer, self._combine = pair, second, layer, combine

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        tap, own = self._pair.taps[self._layer], self._second
        read = args[0] if args else kwargs["hidden_states"]
        tuned = tap.read(args, kwargs, output)
        given = tuple(map(own.of, args)), {name: own.of(value) for name, value in kwargs.items()}
        base = tap.read(*given, self._pair.of_base(self._layer, *given))
        found = self._combine(self._layer, read, base, tuned)
        return None if found is None else tap.write_output(output, found)


def _check_alike(tuned: Decoder, base: Decoder) -> None:
    """Refuse two models whose blocks cannot stand for one another.

    Raises:
        ModelError: they are one object, or differ in depth, width, configuration, shapes or device.
    """
    if tuned.model is base.model:
        raise ModelError("the finetuned model and its base are one object; load the other one too, or give None")
    facts = [(one.model_type, one.num_layers, one.hidden_size) for one in (tuned, base)]
    for what, first, second in zip(("family", "depth", "width"), *facts, strict=True):
        if first != second:
            raise ModelError(_differ(what, first, second))
    configs = [one.model.config.get_text_config() for one in (tuned, base)]
    for name in _FACTS:
        first, second = (getattr(config, name, None) for config in configs)
        if first != second:
            raise ModelError(_differ(name, first, second))
    shapes = [_shapes(one) for one in (tuned, base)]
    for name in sorted(shapes[1]):
        if shapes[0].get(name) != shapes[1][name]:
            raise ModelError(_differ(name, shapes[0].get(name), shapes[1][name]))
    devices = [execution_device(one) for one in (tuned, base)]
    if devices[0] != devices[1]:
        raise ModelError(f"the finetuned model is on {devices[0]} and its base on {devices[1]}; put both on one device")


def _differ(what: str, first: object, second: object) -> str:
    return f"the finetuned model and its base differ in {what}: {first} and {second}; give its own base"


def _shapes(decoder: Decoder) -> dict[str, list[int]]:
    """Name to shape of the weights in the blocks, those of adapters under other names than a plain model has."""
    named = decoder.blocks.named_parameters(remove_duplicate=False)
    return {name.replace(".base_layer", ""): list(value.shape) for name, value in named}


def _adapters(decoder: Decoder) -> list[list[Any]]:
    """The adapter layers in each block.

    Raises:
        ModelError: there are none, or they are merged into the weights.
    """
    module = sys.modules.get("peft.tuners.tuners_utils")
    kind: Any = getattr(module, "BaseTunerLayer", ())
    found = [[part for part in block.modules() if isinstance(part, kind)] for block in decoder.blocks]
    owner = type(inner_model(decoder.model)).__name__
    if not any(found):
        raise ModelError(f"{owner} has no adapter to be switched off; give the model before finetuning as base")
    if any(part.merged for parts in found for part in parts):
        raise ModelError(f"the adapter is merged into {owner}; unmerge it (model.unmerge_adapter()), or give the base")
    return found


@contextlib.contextmanager
def _switched_off(adapters: list[Any]) -> Iterator[None]:
    """Adapter layers give what their base layers give. `enable_adapters` would change which weights take gradients."""
    before = [one._disable_adapters for one in adapters]
    try:
        for one in adapters:
            one._disable_adapters = True
        yield
    finally:
        for one, state in zip(adapters, before, strict=True):
            one._disable_adapters = state
