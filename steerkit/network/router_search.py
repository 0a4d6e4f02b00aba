"""Which module of an MLP with routed experts chooses them: found by what it gives and what that does, not by name.

A router gives, token by token, a score for each expert [n, e], the weights [n, k] of those it chose, and which they are
[n, k]. The MLP is run as a bare copy in which every module is watched; of a module that gives such three, the weights
are then put to zero: where they are what the experts are weighted with, the MLP gives something else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.network.bare_copy import bare_copy, put_parameter
from steerkit.network.block_trace import tensor_of
from steerkit.network.halves import Half

__all__ = ["Chosen", "RouterFound", "find_router", "router_of", "routes_by_scores"]


class Chosen(NamedTuple):
    """Where in what a router gives its scores, weights and indices stand.

    Attributes:
        scores: place of the scores [n, e].
        weights: place of the weights [n, k].
        index: place of the indices [n, k].
        experts: e, how many there are.
        slots: k, how many each token gets.
    """

    scores: int
    weights: int
    index: int
    experts: int
    slots: int


class RouterFound(NamedTuple):
    """A router.

    Attributes:
        name: the module's name inside the MLP.
        module: itself.
        chosen: how to read what it gives.
    """

    name: str
    module: nn.Module
    chosen: Chosen


def router_of(half: Half, runs: Mapping[str, int]) -> RouterFound | str:
    """Find the module that chooses the experts of a half of a block.

    Args:
        half: what computes there.
        runs: how often each module of the block ran in a pass, by its name in the block.

    Returns:
        The router, by its name in the block; or, in words, why there is none that could be served.
    """
    if not half.experts:
        return f"{half} routes no tokens to experts"
    what, read = f"{half} routes tokens to `{half.experts}`", half.first.read
    if len(half.calls) > 1 or read is None or runs[half.first.name] > 1:
        return f"{what}, but is not one module that runs once"
    found = find_router(half.first.module, read.tensor)
    if isinstance(found, str):
        return f"{what}, and {found}"
    name = f"{half.first.name}.{found.name}"
    if name not in runs:
        return f"{what}, and ran without `{name}`, in code that no hook sees into"
    return found._replace(name=name)


def find_router(module: nn.Module, read: Tensor) -> RouterFound | str:
    """Find the module that chooses the experts.

    Args:
        module: the MLP.
        read: [..., d] what it read in a pass.

    Returns:
        What was found, or, in words, why there is no one router that could be served.
    """
    try:
        with torch.no_grad():
            return _search(module, read)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # offloaded, quantised
        reason = (str(error).splitlines() or [""])[0]
        return f"a copy of it does not run ({type(error).__name__}: {reason})"


def _search(module: nn.Module, read: Tensor) -> RouterFound | str:
    twin = bare_copy(module)
    seen: dict[str, list[Any]] = {name: [] for name, _ in twin.named_modules() if name}
    with contextlib.ExitStack() as stack:
        for name, given in seen.items():

            def note(_module: nn.Module, _args: Any, output: Any, given: list[Any] = given) -> None:
                given.append(output)

            stack.callback(twin.get_submodule(name).register_forward_hook(note).remove)
        plain = tensor_of(twin(read))
    found = {name: chosen for name, given in seen.items() if len(given) == 1 and (chosen := _chosen(given[0]))}
    working = {name: one for name, one in found.items() if _weighs(twin, read, plain, name, one)}
    if len(working) != 1:
        several = " and ".join(f"`{name}`" for name in working)
        return (
            f"{several} give experts and weights, where one router is known"
            if working
            else "no module of it gives, token by token, a score for each expert, the chosen ones and their weights"
        )
    ((name, one),) = working.items()
    return RouterFound(name, module.get_submodule(name), one)


def _chosen(output: Any) -> Chosen | None:
    """How to read a router's output; None where it is something else."""
    if not isinstance(output, (tuple, list)) or not all(isinstance(one, Tensor) and one.dim() == 2 for one in output):
        return None
    whole = [place for place, one in enumerate(output) if one.dtype in (torch.int32, torch.int64)]
    if len(whole) != 1:
        return None
    index = output[whole[0]]
    floats = [place for place, one in enumerate(output) if one.is_floating_point() and len(one) == len(index)]
    weights = [place for place in floats if output[place].shape == index.shape]
    scores = [place for place in floats if output[place].shape[1] > index.shape[1]]
    if len(weights) != 1 or len(scores) != 1:
        return None
    experts, slots = output[scores[0]].shape[1], index.shape[1]
    ordered = index.sort(dim=1).values
    if int(index.min()) < 0 or int(index.max()) >= experts or bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        return None
    return Chosen(scores[0], weights[0], whole[0], experts, slots)


def _weighs(twin: nn.Module, read: Tensor, plain: Tensor, name: str, chosen: Chosen) -> bool:
    """Whether the MLP gives something else when the weights are zero."""

    def silence(_module: nn.Module, _args: Any, output: Any) -> Any:
        parts = list(output)
        parts[chosen.weights] = torch.zeros_like(parts[chosen.weights])
        return tuple(parts)

    handle = twin.get_submodule(name).register_forward_hook(silence)
    try:
        return not torch.equal(tensor_of(twin(read)), plain)
    finally:
        handle.remove()


def routes_by_scores(found: RouterFound) -> tuple[nn.Module, str | None]:
    """A copy of a router that reads scores in place of activations, where its choice is no more than the largest ones.

    Its matrix [e, d] is the unit matrix with zeros behind it, its biases are zero: it is run on scores with zeros
    behind them, and gives what the router itself would give if these were its scores.

    Args:
        found: the router.

    Returns:
        The copy; and, in words, why it does not do what it should: None where it does.
    """
    twin, experts = bare_copy(found.module), found.chosen.experts
    wide = {name: one for name, one in twin.named_parameters() if one.dim() == 2 and one.shape[0] == experts}
    own = [name for name, one in twin.named_buffers() if one.shape == (experts,)]
    if own:
        return twin, f"corrects its choice by `{own[0]}`"
    if len(wide) != 1:
        return twin, f"has {len(wide)} matrices with a row for each expert, where one is known"
    ((name, matrix),) = wide.items()
    if matrix.shape[1] < experts:
        return twin, f"reads {matrix.shape[1]} numbers for {experts} experts"
    unit = torch.zeros_like(matrix)
    unit.diagonal().fill_(1.0)
    put_parameter(twin, name, unit)
    drawn = torch.randn(32, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    scores = drawn.to(matrix.device, matrix.dtype)
    read = torch.nn.functional.pad(scores, (0, matrix.shape[1] - experts))
    try:
        with torch.no_grad():
            right = _takes_largest(twin(read), found.chosen)  # with all that the router may add behind its scores
            for other, one in [*twin.named_parameters()]:
                if other != name:
                    put_parameter(twin, other, torch.zeros_like(one))
            given = twin(read)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return twin, f"does not run as a copy ({type(error).__name__})"
    if not right or not _takes_largest(given, found.chosen) or not torch.equal(given[found.chosen.scores], scores):
        return twin, "chooses by more than the largest scores"
    return twin, None


def _takes_largest(given: Any, chosen: Chosen) -> bool:
    """Whether the experts that a router chose are those of the largest scores that it gives."""
    largest = given[chosen.scores].topk(chosen.slots, dim=1).indices.sort(dim=1).values
    return torch.equal(given[chosen.index].sort(dim=1).values, largest)
