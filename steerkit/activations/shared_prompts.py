"""Reading a batch in fewer tokens: what its texts have in common runs once, and the texts go on from its cache.

    what prompts begin with             a row for each system prompt
    the rest of each different prompt   a row each, behind that
    the answers                         a row each, behind their prompts

Two answers to one prompt behind a system prompt of 25 tokens take half as many tokens so. Every token has the
activation that it has in its whole text, and counts for every text that it stands in; but sums over keys run in another
order, so what is read is the same up to rounding and not to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from steerkit.activations.caches import pads_first, rows_of
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.residual_form import plain_tokens
from steerkit.prompts.beginnings import beginnings
from steerkit.tokens.transformers_facts import cache_left_by, empty_attention_cache, is_attention_cache

if TYPE_CHECKING:
    from steerkit.network.decoder import Decoder
    from steerkit.prompts.batching import Batch

__all__ = ["Stretch", "may_share", "stretches"]

_WORTH = 0.9  # of the columns of whole texts: from there on a pass of its own costs more than it saves
_CONTINUED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Stretch:
    """One pass over a stretch of each text of a batch; rows that several texts share stand there once.

    Attributes:
        ids: [n, t] padded at the right.
        mask: [n, past + t] 1 on real tokens, those in the cache too.
        counted: [n, t] how many texts each token counts for: none for pads and for what begins a text.
        rows: by text, its row.
        starts: by text, which of its tokens stands first in that row.
        stops: by text, the token behind its last one here.
        past: what the pass goes on from; it grows with the pass.
    """

    ids: Tensor
    mask: Tensor
    counted: Tensor
    rows: tuple[int, ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    past: Any

    def weights(self, chosen: Sequence[Sequence[int]]) -> Tensor | None:
        """How much each token counts in what is read of each text.

        Args:
            chosen: by text the tokens that are read, whose mean is taken.

        Returns:
            [texts, t] float32 on the CPU; None where nothing is read here.
        """
        found = torch.zeros(len(self.rows), self.ids.shape[1], dtype=torch.float32)
        for text, tokens in enumerate(chosen):
            here = [token - self.starts[text] for token in tokens if self.starts[text] <= token < self.stops[text]]
            found[text, here] = 1.0 / len(tokens)
        return found if bool(found.any()) else None


def may_share(decoder: Decoder) -> bool:
    """Whether this model can go on from a cache that holds the keys and values of every layer, and nothing else.

    Args:
        decoder: the model's decoder, not steered at present.
    """
    model = decoder.model
    if decoder.entry is not decoder.body:  # FSDP gathers the weights of whole passes
        return False
    if model not in _CONTINUED:
        with torch.no_grad(), evaluation_mode(model), plain_tokens(decoder) as ids:
            _CONTINUED[model] = is_attention_cache(cache_left_by(model(input_ids=ids, use_cache=True)))
    return _CONTINUED[model]


def stretches(batch: Batch, device: torch.device) -> Iterator[Stretch] | None:
    """The passes that together are a pass over a batch, each to be run before the next one is asked for.

    Args:
        batch: whole texts.
        device: where the passes run.

    Returns:
        The passes; None where they would have hardly fewer columns than the batch.
    """
    texts = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    cuts = [min(int(length), len(text) - 1) for length, text in zip(batch.prompt_lengths, texts, strict=True)]
    prompts = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    different = list(dict.fromkeys(prompts))
    begun = beginnings(different)
    once = list(dict.fromkeys(begun))
    columns = len(once) * max(map(len, once)) if any(once) else 0
    columns += len(different) * max(len(one) - len(first) for one, first in zip(different, begun, strict=True))
    columns += len(texts) * max(len(text) - cut for text, cut in zip(texts, cuts, strict=True))
    if min(cuts) < 1 or columns > _WORTH * batch.input_ids.numel():
        return None
    return _run(texts, cuts, [different.index(prompt) for prompt in prompts], different, begun, device)


def _run(
    texts: Sequence[tuple[int, ...]],
    cuts: Sequence[int],
    places: Sequence[int],
    different: Sequence[tuple[int, ...]],
    begun: Sequence[tuple[int, ...]],
    device: torch.device,
) -> Iterator[Stretch]:
    """See `stretches`: texts, where their prompts end, which of the different prompts they have, how those begin."""
    cache, once, width = empty_attention_cache(), list(dict.fromkeys(begun)), max(map(len, begun))
    which = [once.index(one) for one in begun]
    if width:
        yield _stretch(once, [()] * len(once), [which[place] for place in places], [0] * len(texts), cache, device)
        pads_first(cache, torch.tensor([len(one) for one in once], dtype=torch.long), width)
        cache = rows_of(cache, torch.tensor(which, dtype=torch.long))
    rests = [prompt[len(one) :] for prompt, one in zip(different, begun, strict=True)]
    if any(rests):
        yield _stretch(rests, begun, places, [len(begun[place]) for place in places], cache, device)
        ends = torch.tensor([width + len(one) for one in rests], dtype=torch.long)
        pads_first(cache, ends, max(map(len, different)))
    cache = rows_of(cache, torch.tensor(places, dtype=torch.long))
    yield _stretch(
        [text[cut:] for text, cut in zip(texts, cuts, strict=True)],
        [different[place] for place in places],
        range(len(texts)),
        cuts,
        cache,
        device,
    )


def _stretch(
    parts: Sequence[tuple[int, ...]],
    before: Sequence[tuple[int, ...]],
    rows: Sequence[int],
    starts: Sequence[int],
    past: Any,
    device: torch.device,
) -> Stretch:
    """A pass over parts of texts, one a row, behind what stands before each of them in the cache."""
    real = pad_sequence([torch.ones(len(one), dtype=torch.long) for one in parts], batch_first=True)
    known = pad_sequence(
        [torch.ones(len(one), dtype=torch.long) for one in before], batch_first=True, padding_side="left"
    )
    ids = pad_sequence([torch.tensor(one, dtype=torch.long) for one in parts], batch_first=True)
    counted = real.float() * torch.tensor([rows.count(row) for row in range(len(parts))], dtype=torch.float32)[:, None]
    if not known.shape[1]:
        counted[:, 0] = 0.0
    return Stretch(
        ids.to(device),
        torch.cat([known, real], dim=1).to(device),
        counted.to(device),
        tuple(rows),
        tuple(starts),
        tuple(start + len(parts[row]) for start, row in zip(starts, rows, strict=True)),
        past,
    )
