"""Whether rows of a model may share a cache: found out by two short texts before anything is served."""

from __future__ import annotations

import torch
from torch import Tensor

from steerkit.errors import ModelError
from steerkit.serve import caches
from steerkit.serve.passes import Pass, Passes
from steerkit.tokens.transformers_facts import is_attention_cache

__all__ = ["can_join"]

_LENGTHS = (7, 5)
# Of the standard deviation of a text's logits. A wrong position or a pad that is read moves them by far more.
_EXACT, _ROUNDED = 1e-3, 0.05


def can_join(passes: Passes) -> bool:
    """Whether rows that are joined give what they give alone.

    State spaces, and whatever keeps more of a text than keys and values, cannot be joined: there each request has a
    cache of its own.

    Args:
        passes: of the model, nothing steered.

    Returns:
        Whether they do.

    Raises:
        ModelError: not even one text alone goes on from its cache as it should.
    """
    vocabulary = passes.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    texts = [[(5 + 3 * place + row) % vocabulary for place in range(size)] for row, size in enumerate(_LENGTHS)]
    whole = [_run(passes, [text]).logits for text in texts]
    begun = [_run(passes, [text[:-1]]) for text in texts]
    if not all(is_attention_cache(one.cache) for one in begun):
        alone = zip(texts, begun, whole, strict=True)
        if not all(_same(passes, _run(passes, [t[-1:]], one.cache, [len(t)]).logits, end) for t, one, end in alone):
            raise ModelError(
                f"{type(passes.decoder.model).__name__} gives other logits from its cache than without it, so it "
                "cannot be served"
            )
        return False
    cache = caches.joined([one.cache for one in begun])
    together = _run(passes, [text[-1:] for text in texts], cache, [len(text) for text in texts]).logits
    return all(_same(passes, together[row : row + 1], one) for row, one in enumerate(whole))


def _run(passes: Passes, texts: list[list[int]], cache: object = None, lengths: list[int] | None = None) -> Pass:
    """A pass over the last tokens of texts that have so many in all; unsteered."""
    ids = torch.tensor(texts, device=passes.device, dtype=torch.long)
    sizes = torch.tensor(lengths or [ids.shape[1]] * len(ids), device=passes.device, dtype=torch.long)[:, None]
    width = int(sizes.max())
    mask = (torch.arange(width, device=passes.device) >= width - sizes).long()
    positions = sizes - ids.shape[1] + torch.arange(ids.shape[1], device=passes.device)
    under = passes.under([passes.plans.unsteered] * len(ids), sizes[:, 0].tolist())
    return passes.run(under, ids, mask=mask if len(ids) > 1 else None, positions=positions, cache=cache)


def _same(passes: Passes, one: Tensor, other: Tensor) -> bool:
    """Whether logits [1, v] are the same but for rounding."""
    wide = next(passes.model.parameters()).dtype in (torch.float32, torch.float64)
    bound = (_EXACT if wide else _ROUNDED) * other.std()
    return bool((one - other).abs().mean() <= bound)
