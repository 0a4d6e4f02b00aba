"""`KeptPrompts`: a prompt that steering does not write is read once; every strength goes on from its cache.

    prompt without its last token   |   last prompt token, answer
    read once, unsteered, cached    |   read at every strength

Scopes that begin at the last prompt token (`response`) or later leave what the prompt's tokens put into the cache as it
is. Rows are laid out anew for it: prompts end in one column, answers begin in the next. Sums over keys run in another
order then, so figures differ from those of whole passes by rounding. Only attention caches are continued: what a
recurrent state has seen is not told by its size, and not every family goes on from one over several tokens.

What prompts begin with, such as a system prompt, is read once for all that do, and a prompt that stands in several
batches is read with the first of them. Not so with sliding windows: between what was read and what follows no pads may
come, and those behind a prompt would push it out of a window.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from steerkit.activations.caches import joined, pads_first, row_of, rows_of
from steerkit.activations.reading import position_inputs
from steerkit.prompts.batching import parted
from steerkit.prompts.beginnings import beginnings
from steerkit.steering.repeated import Repeated
from steerkit.tokens.transformers_facts import cache_argument, cache_left_by, is_attention_cache

if TYPE_CHECKING:
    from steerkit.network.decoder import Decoder
    from steerkit.prompts.batching import Batch

__all__ = ["KeptPrompts", "Split"]


@dataclass(frozen=True, eq=False)
class Split:
    """A batch parted before the last token of each prompt.

    Attributes:
        prompt: [b, p] ids, padded at the left.
        rest: [b, r] ids from the last prompt token on, padded at the right.
        mask: [b, p + r] 1 on real tokens.
        repeated: which rows have the same prompt.
        prompts: the ids of the different prompts.
    """

    prompt: Tensor
    rest: Tensor
    mask: Tensor
    repeated: Repeated
    prompts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Split | None:
        """Part a batch; None where a prompt has a single token, which leaves nothing to be read before.

        Args:
            batch: padded at either side.
            device: where the parts go.
        """
        cuts = [int(length) - 1 for length in batch.prompt_lengths]
        if min(cuts) < 1:
            return None
        rows = [ids[mask.bool()] for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
        pad = int(batch.input_ids[0, 0])  # masked, whatever it is
        prompts = [row[:cut] for row, cut in zip(rows, cuts, strict=True)]
        rests = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
        masks = [
            pad_sequence([torch.ones_like(one) for one in part], batch_first=True, padding_side=side)
            for part, side in ((prompts, "left"), (rests, "right"))
        ]
        ids = [
            pad_sequence(part, batch_first=True, padding_value=pad, padding_side=side)
            for part, side in ((prompts, "left"), (rests, "right"))
        ]
        listed = [tuple(row.tolist()) for row in prompts]
        repeated = Repeated.of(listed).in_order(listed)  # in whatever order a batch has them
        prompt, rest, mask = (one.to(device) for one in (*ids, torch.cat(masks, dim=1)))
        return cls(prompt, rest, mask, repeated, tuple(listed[row] for row in repeated.firsts))


@dataclass(eq=False)
class KeptPrompts:
    """The caches of prompts, each read once for all rows that go on from it, as long as there is room.

    Attributes:
        budget: bytes that may be kept.
    """

    budget: int = 512 * 2**20
    _kept: dict[Hashable, Any] = field(init=False, default_factory=dict, repr=False)
    _rows: dict[tuple[int, ...], Any] = field(init=False, default_factory=dict, repr=False)  # by prompt, parts of these
    _begun: dict[tuple[int, ...], Any] = field(init=False, default_factory=dict, repr=False)
    _used: int = field(init=False, default=0)
    _refused: bool = field(init=False, default=False)
    _is_apart: bool = field(init=False, default=False)  # caches of one row cannot be put together
    _is_full: bool = field(init=False, default=False)  # or prompts would be read again and again, for nothing

    @property
    def may_have(self) -> bool:
        """Whether this model's cache can be continued, as far as is known."""
        return not self._refused

    def has(self, decoder: Decoder, split: Split) -> bool:
        """Whether a pass can go on from what the prompts of a batch left in a cache; they are read if need be.

        Args:
            decoder: the model's decoder, not steered at present.
            split: the batch, on the model's device.

        Returns:
            False where this model's cache cannot be continued so, or there is no room for it.
        """
        if split.prompts in self._kept:
            return True
        if self._refused or self._is_full:
            return False
        cache = self._read(decoder, split)
        if cache is not None:
            self._kept[split.prompts] = cache
        return cache is not None

    def inputs(self, decoder: Decoder, split: Split, rows: Tensor | None = None) -> dict[str, Any]:
        """The arguments of a pass over the rest of a batch, which goes on from what its prompts left in a cache.

        Args:
            decoder: the model's decoder.
            split: a batch that is there (`has`).
            rows: [n] some of its rows, on the CPU; None takes all.

        Returns:
            Ids [n, r - 1] of all but the last column, a mask [n, p + r - 1] over the prompt too, positions, and a cache
            of their own.
        """
        taken = torch.arange(len(split.rest)) if rows is None else rows
        cache = rows_of(self._kept[split.prompts], split.repeated.again[taken])
        mask, width = split.mask[taken, :-1], split.prompt.shape[1]
        positions = {name: ids[:, width:] for name, ids in position_inputs(decoder.model, mask).items()}
        return {
            "input_ids": split.rest[taken, :-1],
            "attention_mask": mask,
            cache_argument(decoder.model): cache,
            "use_cache": True,
            **positions,
        }

    def _read(self, decoder: Decoder, split: Split) -> Any:
        """The cache after the different prompts; None where it cannot be used or there is no room."""
        rows = None if self._is_apart else self._read_rows(decoder, split)
        if rows is None:
            once = split.repeated.once
            cache = _read(decoder, split.prompt[once], split.mask[once, : split.prompt.shape[1]])
            self._refused = not is_attention_cache(cache)
            self._is_apart = not is_attention_cache(cache, windows=False)
        else:
            cache = joined(rows)
        if self._refused or not self._has_room(cache):
            return None
        if not self._is_apart:
            for place, prompt in enumerate(split.prompts):
                self._rows[prompt] = row_of(cache, place, len(prompt))
        return cache

    def _read_rows(self, decoder: Decoder, split: Split) -> list[Any] | None:
        """By prompt a cache of its own, those that no other batch had read now.

        None where rows cannot be joined, or nothing tells yet whether they can: the first prompts are read as they are.
        """
        lacking = [prompt for prompt in split.prompts if prompt not in self._rows]
        device = split.prompt.device
        begun = dict(zip(lacking, self._beginnings(decoder, lacking, device), strict=True))
        if not (self._rows or self._begun):
            return None
        lacking.sort(key=lambda prompt: len(begun[prompt]) - len(prompt))
        found: dict[tuple[int, ...], Any] = {}
        for places in parted([len(one) - len(begun[one]) for one in lacking], max(1, len(lacking)), device):
            prompts = lacking[places.start : places.stop]
            cache = self._gone_on(decoder, prompts, [begun[one] for one in prompts], device)
            found |= {prompt: row_of(cache, place, len(prompt)) for place, prompt in enumerate(prompts)}
        return [found[one] if one in found else self._rows[one] for one in split.prompts]

    def _beginnings(
        self, decoder: Decoder, prompts: Sequence[tuple[int, ...]], device: torch.device
    ) -> list[tuple[int, ...]]:
        """By prompt what it begins with, read and kept; () where that saves nothing or cannot be gone on from."""
        nothing: list[tuple[int, ...]] = [()] * len(prompts)
        found = []
        for prompt, common in zip(prompts, beginnings(prompts) if prompts else (), strict=True):
            known = [ids for ids in self._begun if len(ids) < len(prompt) and prompt[: len(ids)] == ids]
            longest = max(known, key=len, default=())
            found.append(longest if 2 * len(longest) > len(common) else common)
        if not all(found):
            return nothing
        for one in dict.fromkeys(found):
            if one not in self._begun:
                ids = torch.tensor([one], dtype=torch.long, device=device)
                cache = _read(decoder, ids, torch.ones_like(ids))
                self._is_apart = not is_attention_cache(cache, windows=False)
                if self._is_apart or not self._has_room(cache):
                    return nothing
                self._begun[one] = cache
        return found

    def _gone_on(
        self,
        decoder: Decoder,
        prompts: Sequence[tuple[int, ...]],
        begun: Sequence[tuple[int, ...]],
        device: torch.device,
    ) -> Any:
        """The cache after some prompts, pads first, from what is kept of what each of them begins with, if any."""
        rests = [torch.tensor(prompt[len(one) :], dtype=torch.long) for one, prompt in zip(begun, prompts, strict=True)]
        width = max(map(len, begun))
        starts = torch.tensor([width - len(one) for one in begun], dtype=torch.long)
        ends = torch.tensor([width + len(rest) for rest in rests], dtype=torch.long)
        columns = torch.arange(int(ends.max()))
        # Pads stand before the beginnings and behind the prompts in this pass.
        mask = ((columns >= starts[:, None]) & (columns < ends[:, None])).long().to(device)
        ids = pad_sequence(rests, batch_first=True).to(device)
        past = joined([self._begun[one] for one in begun]) if width else None
        found = _read(decoder, ids, mask, past)
        pads_first(found, ends, max(map(len, prompts)))
        return found

    def _has_room(self, cache: Any) -> bool:
        """Whether there is room for one more cache, which then is taken."""
        size = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
        self._is_full = self._used + size > self.budget
        self._used += 0 if self._is_full else size
        return not self._is_full


def _read(decoder: Decoder, ids: Tensor, mask: Tensor, past: Any = None) -> Any:
    """The cache after a pass over ids [b, t], behind what another one holds; the mask [b, past + t] is over both."""
    positions = {name: one[:, -ids.shape[1] :] for name, one in position_inputs(decoder.model, mask).items()}
    given = {} if past is None else {cache_argument(decoder.model): past}
    out = decoder.model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **given, **positions)
    return cache_left_by(out)
