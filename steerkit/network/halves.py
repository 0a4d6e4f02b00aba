"""The halves of a block: attention (or what stands in its place) and the MLP, whatever their modules are called."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

from steerkit.network.block_trace import Call
from steerkit.network.structure import computes_something, is_linear, is_stack, outermost

__all__ = ["Half", "halves_of", "is_recurrent"]

# Names of transformers' config.layer_types for blocks that carry a state instead of keys and values.
_RECURRENT = ("linear_attention", "mamba", "recurrent", "conv", "hybrid", "hybrid_sliding")


@dataclass(frozen=True, eq=False)
class Half:
    """A part of a block that computes something for the residual stream: one module, or linears in a row (OPT).

    Attributes:
        calls: the module, or the linears that stand on the block itself, in the order they ran.
        linears: the linear layers in it, in the order they ran.
    """

    calls: tuple[Call, ...]
    linears: tuple[Call, ...]

    @property
    def first(self) -> Call:
        """The module that reads."""
        return self.calls[0]

    @property
    def last(self) -> Call:
        """The module that gives."""
        return self.calls[-1]

    @property
    def mixes_tokens(self) -> bool:
        """Whether it takes an attention mask, as attention and state-space modules do and MLPs do not."""
        module = getattr(self.first.module, "_orig_mod", self.first.module)
        return any("mask" in name for name in inspect.signature(type(module).forward).parameters)

    @property
    def experts(self) -> str | None:
        """The name of routed experts inside it, whose tokens are neither all there nor in order."""
        for name, module in self.first.module.named_modules():
            if name.split(".")[-1] == "experts" or (is_stack(module) and not self.mixes_tokens):
                return f"{self.first.name}.{name}".rstrip(".")
        return None

    def __str__(self) -> str:
        return f"`{self.first.name}`" if len(self.calls) == 1 else f"`{self.first.name}` to `{self.last.name}`"


def halves_of(parts: list[Call], calls: list[Call]) -> list[Half]:
    """The parts of a block that hold matrices; linears in a row on the block itself are one half.

    Args:
        parts: the calls of the modules directly inside the block, in the order they ran.
        calls: those of all modules in it.
    """
    groups: list[list[Call]] = []
    for part in parts:
        if not computes_something(part.module):
            continue
        if groups and is_linear(part.module) and is_linear(groups[-1][-1].module):
            groups[-1].append(part)
        else:
            groups.append([part])
    return [Half(tuple(group), tuple(_linears(group, calls))) for group in groups]


def _linears(group: list[Call], calls: list[Call]) -> list[Call]:
    """The outermost linear layers that were called inside of a group of calls."""
    inside = [call for call in calls if call in group or any(call.inside(part) for part in group)]
    return outermost([call for call in inside if is_linear(call.module)])


def is_recurrent(half: Half, layer_type: str | None) -> bool:
    """Whether a half that mixes tokens carries a state: the config says so, or it convolves over time.

    Args:
        half: one that mixes tokens.
        layer_type: the config's word for its block; None where it has none.
    """
    if layer_type is not None:
        return layer_type in _RECURRENT
    convolves = any(isinstance(module, nn.Conv1d) for module in half.first.module.modules())
    return convolves or not half.mixes_tokens
