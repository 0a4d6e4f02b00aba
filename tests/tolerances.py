"""How far two right ways of computing the same thing may lie apart, on any processor.

Sums taken in another order differ in their last bits, and every block after that carries the difference on, makes it
larger or smaller. How much larger depends on dtype, width, depth and above all on the model: the delta rule of a tiny
Qwen3-Next turns one rounding of its input into twenty times what a tiny GPT-2 makes of it. So no number fits all models.
The model itself tells: it is run unsteered once more with its input embeddings moved by one unit in the last place, as
an order of summation that the processor chooses would move them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def rounded_inputs(model: nn.Module, seed: int) -> Iterator[None]:
    """The model with half of the numbers of its input embeddings moved by one unit in the last place."""
    table: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    def move(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        sides = torch.randint(0, 2, output.shape, generator=generator).to(output.device)
        return (output.float() * (1 + sides * torch.finfo(output.dtype).eps)).to(output.dtype)

    handle = table.register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def spread(model: nn.Module, run: Callable[[], Tensor], *, draws: int = 3) -> float:
    """The largest difference that one rounding of the input embeddings makes to what `run` gives."""
    with torch.no_grad():
        plain = run()
        moved = []
        for seed in range(draws):
            with rounded_inputs(model, seed):
                moved.append(float((run() - plain).abs().max()))
    return max(moved)


def allowed(model: nn.Module, run: Callable[[], Tensor], at_least: float) -> float:
    """The largest difference that rounding explains.

    One rounding at the embeddings is one of many: each block rounds about eight times (two norms, four projections of
    attention and MLP, what lies between), none of which reaches the logits through more blocks than the first. Such
    errors are independent, so together they make the square root of their number of one.

    Args:
        model: unsteered.
        run: what is compared, computed by the model as it is.
        at_least: what is allowed of every model, such as a few units in the last place of the largest number.
    """
    return max(at_least, math.sqrt(8 * model.config.get_text_config().num_hidden_layers) * spread(model, run))
