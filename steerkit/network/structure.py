"""What kind of module one is (a norm, a linear layer, a stack of experts), told from its parameters, not its name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor, nn

from steerkit.network.block_trace import Call

__all__ = ["computes_something", "is_linear", "is_norm", "is_stack", "outermost"]


def _tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(recurse), module.buffers(recurse))


def is_norm(module: nn.Module) -> bool:
    """A module that holds at most a weight and a bias for each channel."""
    dims = [tensor.dim() for tensor in _tensors(module)]
    return max(dims, default=0) < 2 and (bool(dims) or "norm" in type(module).__name__.lower())


def is_linear(module: nn.Module) -> bool:
    """A linear layer of any make: nn.Linear, Conv1D, quantised, or wrapped by peft."""
    for wrapped in (getattr(module, "base_layer", None), getattr(module, "original_module", None)):
        if isinstance(wrapped, nn.Module):
            return is_linear(wrapped)
    if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
        return False
    if hasattr(module, "in_features"):  # a dynamically quantised one keeps its numbers in a module without tensors
        return not any(True for child in module.children() for _ in _tensors(child))
    return not any(True for _ in module.children()) and any(t.dim() == 2 for t in _tensors(module, recurse=False))


def is_stack(module: nn.Module) -> bool:
    """A module that holds one matrix for each of several experts."""
    convolves = isinstance(module, nn.modules.conv._ConvNd)
    return not convolves and any(min(p.shape) > 1 and p.dim() >= 3 for p in module.parameters(recurse=False))


def computes_something(module: nn.Module) -> bool:
    """A module that holds a matrix, in itself or in what stands inside it."""
    return any(map(is_linear, module.modules())) or any(tensor.dim() >= 2 for tensor in _tensors(module))


def outermost(calls: list[Call]) -> list[Call]:
    """The calls that stand inside no other of the calls."""
    names = {call.name for call in calls}
    return [
        call
        for call in calls
        if not any(call.name[:dot] in names for dot, letter in enumerate(call.name) if letter == ".")
    ]
