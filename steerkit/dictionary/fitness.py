"""How well a dictionary fits a model: what it explains of activations, how many latents fire, which never do.

    FVU  = sum |h - decode(encode(h))|^2  /  sum |h - mean h|^2       over tokens of neutral texts, first ones left out
    L0   = mean number of latents that fire on a token
    dead = share of latents that fire on no token

FVU near 0 is a dictionary that says nearly all there is; at 1 it says no more than the mean does, and above it less: so
it looks where a dictionary is read at another scale, at another place, or on another model than its own. A latent that
does not fire on a few thousand tokens of plain text may still be alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.activations.recording import record_ids
from steerkit.dictionary.dictionary import Dictionary
from steerkit.errors import DataError
from steerkit.prompts.conversation import Conversation, Prompt
from steerkit.prompts.neutral import neutral_texts
from steerkit.prompts.rendering import render

__all__ = ["Fitness", "check_dictionary", "fitness_of"]

_ROWS = 1024


@dataclass(frozen=True)
class Fitness:
    """What a dictionary does on activations.

    Attributes:
        fvu: fraction of variance unexplained.
        l0: mean latents that fire on a token.
        dead: share of latents that fire on none of the tokens.
        peak: median over tokens of the strongest latent, what the method `latent` counts in.
        tokens: how many were read.
    """

    fvu: float
    l0: float
    dead: float
    peak: float
    tokens: int

    @property
    def explained(self) -> float:
        """Share of the variance that it explains; below 0 it does worse than the mean."""
        return 1.0 - self.fvu


def fitness_of(dictionary: Dictionary, rows: Tensor) -> Fitness:
    """Measure a dictionary on activations.

    Args:
        dictionary: any.
        rows: [n, d] activations of its site, two at the least.

    Raises:
        DataError: there are fewer than two, or all are the same.
        VectorMismatchError: they have another width.
    """
    if len(rows) < 2:
        raise DataError(f"dictionary: {len(rows)} tokens tell nothing of it; give texts of two tokens or more")
    mean = rows.double().mean(dim=0)
    missed = spread = fired = 0.0
    alive = torch.zeros(dictionary.num_latents, dtype=torch.bool)
    strongest = []
    for part in torch.split(rows, _ROWS):  # of 32 thousand latents a thousand tokens are 128 MB
        latents = dictionary.encode(part)
        missed += float((part.double() - dictionary.decode(latents).double()).square().sum())
        spread += float((part.double() - mean).square().sum())
        fired += float((latents > 0).sum())
        alive |= (latents > 0).any(dim=0).cpu()
        strongest.append(latents.amax(dim=-1).cpu())
    if not spread > 0:
        raise DataError(
            "dictionary: all activations are the same, so no variance is there to explain; give other texts"
        )
    return Fitness(
        fvu=missed / spread,
        l0=fired / len(rows),
        dead=float((~alive).double().mean()),
        peak=float(torch.cat(strongest).median()),
        tokens=len(rows),
    )


def check_dictionary(
    model: nn.Module,
    tokenizer: Any,
    dictionary: Dictionary,
    texts: Sequence[Prompt] | None = None,
    *,
    max_tokens: int = 256,
) -> Fitness:
    """Measure a dictionary on a model, on neutral texts; the first token of each is left out.

    Args:
        model: a transformers model, unsteered.
        tokenizer: its tokenizer.
        dictionary: trained on this model at its site, as is hoped.
        texts: what is read; None takes the shipped neutral texts.
        max_tokens: of each text.

    Raises:
        VectorMismatchError: the site is of another width than the dictionary.
        SiteError: the model has no such site.
        DataError: there is no text of two tokens.
    """
    dictionary.check(model)
    items = neutral_texts() if texts is None else [Conversation.of(text) for text in texts]
    rows = [render(tokenizer, item).ids[:max_tokens] for item in items]
    long_enough = [ids for ids in rows if len(ids) > 1]
    if not long_enough:
        raise DataError("dictionary: no text has two tokens, and the first is left out; give longer ones")
    (read,) = record_ids(model, long_enough, [dictionary.site]).values()
    return fitness_of(dictionary, torch.cat([kept[1:] for kept in read]))
