"""Which module of an MLP with routed experts chooses them: found by what it gives and what that does, not by name.

A router gives, token by token, a score for each expert [n, e], the weights [n, k] of those it chose, and which they are
[n, k]. Where a module of the MLP gave such three in a pass, the MLP is run again as a bare copy in which the weights
are zero: where they are what the experts are weighted with, it gives something else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.network.bare_copy import bare_copy, put_parameter
from steerkit.network.block_trace import Call, tensor_of
from steerkit.network.halves import Half

__all__ = ["Chosen", "RouterFound", "router_of", "routes_by_scores"]


@dataclass(frozen=True)
class Chosen:
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
        name: the module's name inside the block.
        module: itself.
        chosen: how to read what it gives.
    """

    name: str
    module: nn.Module
    chosen: Chosen


def router_of(half: Half, calls: Sequence[Call]) -> RouterFound | str:
    """Find the module that chooses the experts of a half of a block.

    Args:
        half: what computes there.
        calls: of all modules of the block, in a pass.

    Returns:
        The router, by its name in the block; or, in words, why there is none that could be served.
    """
    if not half.experts:
        return f"{half} routes no tokens to experts"
    what, first = f"{half} routes tokens to `{half.experts}`", half.first
    runs = Counter(call.name for call in calls)
    if len(half.calls) > 1 or first.read is None or runs[first.name] > 1:
        return f"{what}, but is not one module that runs once"
    found = [
        RouterFound(call.name, call.module, chosen)
        for call in calls
        if call.inside(first) and runs[call.name] == 1 and call.several and (chosen := _chosen(call.several))
    ]
    working = [one for one in found if _weighs(first, one)]
    if len(working) == 1:
        return working[0]
    if working:
        return f"{what}, and {' and '.join(f'`{one.name}`' for one in working)} choose them, where one router is known"
    if not any(call.inside(first) for call in calls):
        return f"{what} in code that no hook sees into; load the model with use_kernels=False"
    return (
        f"{what}, and no module of it gives, token by token, a score for each expert, the chosen ones and their weights"
    )


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


def _weighs(first: Call, found: RouterFound) -> bool:
    """Whether the MLP gives something else when the weights are zero; taken for granted where a copy does not run."""

    def silence(_module: nn.Module, _args: Any, output: Any) -> Any:
        parts = list(output)
        parts[found.chosen.weights] = torch.zeros_like(parts[found.chosen.weights])
        return tuple(parts)

    assert first.read is not None
    twin = bare_copy(first.module)
    try:
        with torch.no_grad():
            plain = tensor_of(twin(first.read.tensor))
            twin.get_submodule(found.name.removeprefix(f"{first.name}.")).register_forward_hook(silence)
            return not torch.equal(tensor_of(twin(first.read.tensor)), plain)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # offloaded, quantised
        return True


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
    scores = _different_scores(experts).to(matrix.device, matrix.dtype)
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


def _different_scores(experts: int) -> Tensor:
    """[32, e] scores between -8 and 8 in random orders, no two of a row equal, exact in half precision."""
    order = torch.rand(32, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float32).argsort(dim=1)
    return (order - experts // 2).float() * 2.0 ** -max(0, math.ceil(math.log2(experts / 16)))


def _takes_largest(given: Any, chosen: Chosen) -> bool:
    """Whether the experts that a router chose are those of the largest scores that it gives."""
    largest = given[chosen.scores].topk(chosen.slots, dim=1).indices.sort(dim=1).values
    return torch.equal(given[chosen.index].sort(dim=1).values, largest)
