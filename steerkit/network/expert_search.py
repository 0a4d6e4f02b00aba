"""Which parameters of an MLP with routed experts hold the down projections: found by trying, not by name.

A block's experts are one stack of matrices in one module, which sends every token through a few of them. The MLP is
run as a bare copy with single parameters replaced. A matrix of which only row 0 is not zero moves number 0 of what the
MLP gives, in proportion to the row, and no other number. Of an MLP's parameters only down projections behave so: those
of the routed experts, and that of one expert which takes every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from steerkit.network.bare_copy import bare_copy, put_parameter
from steerkit.network.block_trace import argument_of, tensor_of

__all__ = ["Down", "Found", "find_down_projections", "routing_of"]

_ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 5e-3}


class Down(NamedTuple):
    """A parameter that holds down projections.

    Attributes:
        name: its name inside the MLP.
        transposed: whether a matrix is stored [i, o], as in GPT-OSS, and not [o, i].
    """

    name: str
    transposed: bool

    @property
    def owner(self) -> str:
        """The name of the module that holds it."""
        return self.name.rpartition(".")[0]


# Found once for each module: which parameters write does not depend on their values.
_KNOWN: Any = WeakIdKeyDictionary()
Found: TypeAlias = tuple[Down, Down | None, tuple[str, ...]]
"""The routed experts' stack, the shared expert's projection if there is one, and the names of the biases of both."""


def find_down_projections(module: nn.Module, read: Tensor, gave: Tensor) -> Found | str:
    """Find the parameters of an MLP that write to the residual stream.

    Args:
        module: the MLP.
        read: [b, t, d] what it read in a pass.
        gave: [b, t, d], or [b*t, d], what it gave.

    Returns:
        What was found, or, in words, why the experts cannot be told apart.
    """
    if module not in _KNOWN:
        try:
            with torch.no_grad():
                _KNOWN[module] = _search(module, read, gave)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # offloaded, quantised
            reason = (str(error).splitlines() or [""])[0]
            return f"a copy of them does not run ({type(error).__name__}: {reason})"
    known: Found | str = _KNOWN[module]
    return known


def _search(module: nn.Module, read: Tensor, gave: Tensor) -> Found | str:
    """Find the matrices that write a module's output, by changing each alone; else say why none are told."""
    twin, width = bare_copy(module), gave.shape[-1]
    stacks: list[Down] = []
    linears: list[Down] = []
    parameters = {name: value for name, value in twin.named_parameters() if value.is_floating_point()}
    for name, value in parameters.items():
        is_linear = _is_linear(twin.get_submodule(name.rpartition(".")[0]))
        for axis in (1, 2) if value.dim() == 3 else (0, 1) if value.dim() == 2 and is_linear else ():
            if value.shape[axis] == width and _writes(twin, read, name, axis):
                found, last = (stacks, 2) if value.dim() == 3 else (linears, 1)
                found.append(Down(name, axis == last))
                break
    if len(stacks) != 1 or len(linears) > 1:
        return (
            f"{len(stacks)} stacks of matrices and {len(linears)} linear layers write, where 1 and at most 1 are known"
        )
    if not _is_told(twin, read, stacks[0].owner):
        return f"`{stacks[0].owner}` is not told, token by token, which experts are meant"
    for down in (*stacks, *linears):  # a number that every row is multiplied with moves nothing any more: no bias
        put_parameter(twin, down.name, torch.zeros_like(parameters[down.name]))
    matrices = {down.name for down in (*stacks, *linears)}
    biases = tuple(
        name
        for name, value in parameters.items()
        if name not in matrices and value.dim() in (1, 2) and value.shape[-1] == width
        if _writes(twin, read, name, value.dim() - 1)
    )
    for name in biases:
        put_parameter(twin, name, torch.zeros_like(parameters[name]))
    left = tensor_of(twin(read)).abs().max()
    if float(left) > _ROUNDING.get(gave.dtype, 1e-4) * float(gave.abs().max()):
        return "something writes beside their matrices"
    return stacks[0], (linears[0] if linears else None), biases


def _is_told(twin: nn.Module, read: Tensor, owner: str) -> bool:
    """Whether a module is called with every token, and with which experts it goes to."""
    told = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routing = routing_of(args, kwargs)
        told.append(routing is not None and len(routing[0]) == read.shape[:-1].numel())

    handle = twin.get_submodule(owner).register_forward_pre_hook(look, with_kwargs=True)
    twin(read)
    handle.remove()
    return told == [True]


def _writes(twin: nn.Module, read: Tensor, name: str, axis: int) -> bool:
    """Whether the part of a parameter at place 0 of an axis moves number 0 of what is given, linearly, and no other."""
    old = twin.get_parameter(name)
    shape = (1, *old.shape[1:]) if old.dim() == 3 else tuple(old.shape)
    generator = torch.Generator().manual_seed(0)
    one, other = (
        torch.randn(shape, generator=generator, dtype=torch.float32).to(old).select(axis, 0) for _ in range(2)
    )

    def given(part: Tensor) -> Tensor:
        value = old.new_zeros(shape)
        value.select(axis, 0).copy_(part)
        put_parameter(twin, name, value.expand(old.shape))
        output: Tensor = tensor_of(twin(read))
        return output.float()

    try:
        for scale in (1.0, 1e3):  # a shared expert may be all but silent on these few tokens
            still = given(torch.zeros_like(one))
            first, second, both = (given(scale * part) - still for part in (one, other, one + other))
            near = _ROUNDING.get(old.dtype, 1e-4) * torch.stack([still, first, second, both]).abs().max()
            if bool(both[..., 0].abs().max() > 5 * near):
                apart = torch.maximum((both - first - second).abs().max(), both[..., 1:].abs().max())
                return bool(apart <= near)
    finally:
        put_parameter(twin, name, old)
    return False


def routing_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Tokens [n, d], their experts [n, k] and the weights [n, k] of those, if that is what a module is called with.

    Args:
        args: the module's positional arguments.
        kwargs: its keyword arguments.
    """
    hidden = argument_of(args, kwargs)
    rest = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one is not hidden]
    index = [one for one in rest if not one.is_floating_point() and one.dtype != torch.bool and one.dim() == 2]
    weights = [one for one in rest if one.is_floating_point() and len(index) == 1 and one.shape == index[0].shape]
    if not isinstance(hidden, Tensor) or len(weights) != 1 or hidden.shape[:-1] != index[0].shape[:1]:
        return None
    return hidden, index[0], weights[0]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
