"""What each half of a block adds to the residual stream, found by adding up.

Between a half and the stream may stand a norm, a dropout, or nothing, and some blocks add the residual inside the half.
So no name tells which tensor is added; the one is meant for which

    resid_post = resid_pre + what attention adds + what the MLP adds

holds in numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch

from steerkit.network.block_trace import Call, Seen
from steerkit.network.halves import Half
from steerkit.network.structure import is_norm

__all__ = ["added_by_halves", "gives", "is_scaled"]

# A sum computed in one order against another, relative to the sizes of the summands, element by element.
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3}


def added_by_halves(
    halves: Sequence[Half], parts: Sequence[Call], runs: Mapping[str, int], entered: Seen, left: Seen
) -> list[tuple[Call, Call]] | None:
    """Find for each half the module that gives what it adds to the stream.

    Args:
        halves: of the block.
        parts: the calls of the modules directly inside the block.
        runs: how often each module ran, by its name.
        entered: what the block read, [b, t, d].
        left: what it gave, [b, t, d].

    Returns:
        By half that module's call, and the call that gives the same before a post-norm (which is the first one where
        there is no post-norm); None where the block's output is no such sum.
    """
    chains = [_places(half, halves, parts, runs, left.values.numel()) for half in halves]
    if any(gives(call, left) and is_norm(call.module) for call in parts):
        return _sum_before_norms(chains, entered, parts)
    return _best_sum(chains, entered, left)


def _places(
    half: Half, halves: Sequence[Half], parts: Sequence[Call], runs: Mapping[str, int], size: int
) -> list[tuple[Call, Call]]:
    """Where a half's contribution may be had, furthest downstream first, each with its form before any norm."""
    chain = [(half.last, half.last)]
    for call in parts[parts.index(half.last) + 1 :]:
        last, raw = chain[-1]
        if not gives(last, call.read):
            continue
        if runs[call.name] > 1:  # Phi's one dropout for both halves
            continue
        if call.made is not None and call.made.same_as(call.read):  # dropout, at rest in this pass
            chain.append((call, call if raw is last else raw))
        elif is_norm(call.module) and not any(gives(call, other.first.read) for other in halves):
            chain.append((call, raw))
    inner = [call for call in half.linears[-1:] if call is not half.last]  # Bloom adds the residual itself
    candidates = [*reversed(chain), *((call, call) for call in inner)]
    fitting = [pair for pair in candidates if pair[0].gave is not None and pair[0].gave.values.numel() == size]
    first = {pair[0].gave: pair for pair in reversed(fitting)}  # attention gives what its last layer gave: one place
    return [pair for pair in fitting if first[pair[0].gave] is pair]


def _best_sum(chains: list[list[tuple[Call, Call]]], entered: Seen, left: Seen) -> list[tuple[Call, Call]] | None:
    """The choice of one place for each half that adds up best, if it does."""
    best, least = None, math.inf
    for choice in itertools.product(*chains):
        excess = _excess(entered, [call for call, _ in choice], left)
        if excess < least:
            best, least = list(choice), excess
    return best if least <= 1 else None


def _sum_before_norms(
    chains: list[list[tuple[Call, Call]]], entered: Seen, parts: Sequence[Call]
) -> list[tuple[Call, Call]] | None:
    """The same where each sum goes through a norm: the norm must read the stream plus the half's output."""
    chosen = []
    stream: Seen | None = entered
    norms = [call for call in parts if is_norm(call.module) and call.read is not None]
    for chain in chains:
        fits = [
            (pair, norm)
            for pair, norm in itertools.product(chain, norms)
            if stream is not None and norm.read is not None and _excess(stream, [pair[0]], norm.read) <= 1
        ]
        if not fits:
            return None
        chosen.append(fits[0][0])
        stream = fits[0][1].gave
    return chosen


def _excess(start: Seen, parts: list[Call], end: Seen) -> float:
    """How far `end` is from `start` plus the parts, in units of what rounding explains; at most 1 is equal."""
    seen = [start, *(call.gave for call in parts if call.gave is not None)]
    shape = end.values.shape
    values = [one.values.reshape(shape) for one in seen]
    tolerance = max(_rounding(one) for one in (*seen, end))
    # Element by element: one huge channel, as real models have, must not hide the others.
    size, total = torch.zeros_like(end.values), torch.zeros_like(end.values)
    for one in values:
        size, total = size + one.abs(), total + one
    gap = (end.values - total).abs() / size.clamp_min(torch.finfo(torch.float32).tiny)
    worst = gap.max().item() / tolerance
    return worst if math.isfinite(worst) else math.inf


def _rounding(seen: Seen) -> float:
    """How far sums of the tensor's dtype may lie apart."""
    return _TOLERANCE.get(seen.tensor.dtype, 1e-4)


def gives(call: Call, read: Seen | None) -> bool:
    """Whether what the call gave is what was read.

    Args:
        call: of one module.
        read: what another one read; None is nothing.
    """
    return call.gave is not None and call.gave.same_as(read)


def is_scaled(part: Seen | None, whole: Seen | None) -> bool:
    """Whether the whole is the part times one number, as it is (1) or in Falcon-H1's scaled MLP.

    Args:
        part: a tensor of any shape.
        whole: one of as many numbers.
    """
    if part is None or whole is None or part.values.numel() != whole.values.numel():
        return False
    mine, other = part.values.flatten(), whole.values.flatten()
    factor = mine.dot(other) / mine.dot(mine).clamp_min(torch.finfo(torch.float32).tiny)
    tolerance = max(_rounding(seen) for seen in (part, whole))
    return bool(((other - factor * mine).abs() <= tolerance * other.abs()).all())
