"""What rounding explains: the one rule behind tolerances of tests that compare two ways to compute the same numbers.

A sum of floats depends on the order of its terms, and that order is the processor's: the width of its vectors, its
fused products, its threads. Two right ways to compute the same thing therefore differ, and by how much depends on the
model as much as on the precision: an ill-conditioned one makes hundreds of roundings out of one. So a tolerance is
measured on the unsteered model itself, on the processor that runs the test: it runs again with its input embeddings
moved by one unit in the last place, and a few times what comes of that is allowed.
`tests/test_tolerances.py` holds this rule against the same models in float64.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from steerkit.network.decoder import find_decoder
from tests import modes
from tests.families import VOCAB, build

ROUNDINGS = 4.0
"""How many times the effect of one rounding of the input is allowed.

Both sides of a comparison round in every block and the input is rounded once; early roundings grow on their way and
late ones do not, so the sum is of the size of the first. The rest is room for the luck of the draw.
"""
DRAWS = 3
PRODUCTS = 6
"""Products of a block, one after the other: queries and keys, scores, values, the output, into the MLP, out of it."""
COARSE = 1e-3
"""Tests call two answers different from here on, so no tolerance of a model in float32 may reach it."""


@contextlib.contextmanager
def rounded_input(model: Any, seed: int) -> Iterator[None]:
    """Half of all input embeddings are one unit in the last place larger, drawn anew at every pass."""
    generator = torch.Generator().manual_seed(seed)

    def move(_module: Any, _args: Any, output: Tensor) -> Tensor:
        sides = torch.randint(0, 2, output.shape, generator=generator)
        return output * (1 + sides * torch.finfo(output.dtype).eps).to(output)

    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def tolerance(model: Any, run: Callable[[], Tensor] | Tensor) -> float:
    """The largest difference that rounding explains, relative to the largest value.

    Args:
        model: the transformers model, not steered.
        run: runs it and gives the numbers that are compared, or numbers of their kind; token ids [b, t] stand for the
            logits of one plain pass over them.
    """
    ids = run
    measured = run if callable(run) else lambda: model(input_ids=ids, use_cache=False).logits
    plain = measured()
    decoder = find_decoder(model)
    spreads = [summing(decoder.hidden_size, PRODUCTS * decoder.num_layers)]
    for seed in range(DRAWS):
        with rounded_input(model, seed):
            spreads.append(gap(measured(), plain))
    return ROUNDINGS * max(spreads)


@functools.cache
def of_family(family: str) -> float:
    """The largest relative difference of logits that rounding explains in a tiny model of `tests.families`.

    Two orders of the model are measured: its input rounded, and its steps on a cache against one pass over all tokens.
    The second is the larger one where a family has another formula for a step than for a whole text, as the linear
    attention of Qwen3-Next has.
    """
    model: Any = build(family)
    with torch.no_grad():
        steps = [modes.gap(ran, again) for ran, again, _ in modes.run_steered(model, "cached", None)]
    ids = torch.arange(6 * 32).mul(7919).remainder(VOCAB).reshape(6, 32)
    found = max(tolerance(model, ids), ROUNDINGS * max(steps))
    assert found < COARSE, f"{family}: {found:.1e} of the largest logit would hide a fault"
    return found


def summing(terms: int, products: int) -> float:
    """What the order of sums makes of them: a random walk, in each sum and over products one after the other.

    Processors sum in float32, also where the factors are bfloat16. No tolerance is below it: the products in each block
    round by themselves, and that is in no rounding of the input.
    """
    return float(torch.finfo(torch.float32).eps) * math.sqrt(terms * products)


def gap(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-6))
