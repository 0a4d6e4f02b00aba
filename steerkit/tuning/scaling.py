"""`scaled`: what finetuning adds in each block, times a factor, while the model runs as it is.

    x_{l+1} = x_l + PTC_l + alpha * FTC_l            at all blocks and tokens; see `pair`

It is not an interpolation of weights: halfway the logits of the two differ.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from steerkit.errors import StrengthError
from steerkit.network.decoder import inner_model
from steerkit.steering.shared_prefixes import drop_shared_prefixes, refuse_running_batches
from steerkit.tuning.pair import Pair

__all__ = ["scaled"]


@contextlib.contextmanager
def scaled(model: nn.Module, base: nn.Module | None = None, alpha: float = 1.0) -> Iterator[None]:
    """Scale what finetuning contributes inside a `with` block. Each block runs twice, and a cache is kept twice.

    At 1 nothing is hooked, so the model is bitwise itself; at 0 base blocks run between the finetuned embeddings, norm
    and head. `generate` works with its caches and beams. A cache is filled and gone on from inside the context.
    Contexts of `steer` around it or in it edit what flows on from both.

    Args:
        model: the finetuned transformers model, or a PEFT model.
        base: the model before finetuning, on the same device; None switches the adapters of `model` off block by block.
        alpha: the factor; useful ones are near 1, the paper's from 0.75 to 1.25.

    Yields:
        Nothing.

    Raises:
        StrengthError: `alpha` is not finite.
        ModelError: as for `Pair`; the model is in such a context already; or, while it runs, a cache comes from
            outside.
        SiteError: the model's residual stream is not one vector for each token.

    Example:
        with steerkit.tuning.scaled(tuned, base, 0.75):
            tuned.generate(**inputs)
    """
    if not math.isfinite(alpha):
        raise StrengthError(f"alpha is {alpha}; give a finite number, 1 for the finetuned model and 0 for base blocks")
    pair, inner = Pair(model, base), inner_model(model)
    if alpha == 1.0:  # base + (tuned - base) would be rounded
        yield
        return

    def combine(_layer: int, _read: Tensor, plain: Tensor, tuned: Tensor) -> Tensor:
        wide = torch.promote_types(tuned.dtype, torch.float32)
        first = plain.to(wide)
        return (first + alpha * (tuned.to(wide) - first)).to(tuned.dtype)

    refuse_running_batches(inner, "scaled")
    drop_shared_prefixes(inner)
    try:
        with pair.hooked(combine):
            yield
    finally:
        drop_shared_prefixes(inner)
    refuse_running_batches(inner, "end of scaled")
