"""Two texts that begin alike in one row: what they share is computed once, and neither sees the rest of the other.

    row            [ shared ][ rest of A ][ rest of B ]
    positions        0 .. c-1   c .. a-1     c .. b-1
    B attends to     yes        no           up to itself

A mask in the shape of a tree does that where attention takes one (SpecInfer, Miao et al. 2023, arXiv 2305.09781). Two
answers to one prompt are the usual case. Whether a model takes such masks is found out once, by a pass over two short
texts: recurrent layers and positions that come from the mask alone do not. Windows shorter than a text do not either.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerkit.errors import FitError
from steerkit.network.block_trace import evaluation_mode, tensor_of
from steerkit.network.decoder import Decoder
from steerkit.network.residual_form import plain_tokens
from steerkit.prompts.batching import Batch

__all__ = ["PairedTexts", "paired"]

MASK_BYTES = 2**26
"""A mask of a batch is at most so large; beyond it texts are read one by one."""
_WORTH = 0.9
_CLOSE = 1e-4
# By decoder: whether it takes such masks with its kind of attention, in its dtype.
_TAKES: WeakKeyDictionary[nn.Module, dict[tuple[Any, torch.dtype], bool]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class PairedTexts:
    """A batch whose neighbours share a row.

    Attributes:
        input_ids: [b / 2, w].
        positions: [b / 2, w] of each token in its text.
        allowed: [b / 2, 1, w, w] which tokens each one attends to.
        columns: [b, t] where the token of a text stands in its row; 0 for pads.
    """

    input_ids: Tensor
    positions: Tensor
    allowed: Tensor
    columns: Tensor

    @classmethod
    def of(cls, batch: Batch) -> PairedTexts | None:
        """Put neighbours into one row; None where that saves too little, or the rows do not come in pairs.

        Which of the two comes first follows from their tokens: swapped, they are read to the same last digit.

        Args:
            batch: padded at the right.
        """
        rows, width = batch.input_ids.shape
        lengths = batch.attention_mask.sum(dim=1)
        if rows % 2 or not bool(batch.attention_mask[:, 0].all()):
            return None
        ids, real = batch.input_ids.view(-1, 2, width), batch.attention_mask.view(-1, 2, width).bool()
        alike = (ids[:, 0] == ids[:, 1]) & real.all(dim=1)
        shared = alike.long().cumprod(dim=1).sum(dim=1)
        fork = torch.where(real, ids, -1).gather(2, shared.clamp_max(width - 1)[:, None, None].expand(-1, 2, 1))
        is_swapped = fork[:, 0] > fork[:, 1]  # [b / 2, 1]
        ids = torch.where(is_swapped[..., None], ids.flip(1), ids)
        first, second = torch.where(is_swapped, lengths.view(-1, 2).flip(1), lengths.view(-1, 2)).unbind(1)
        wide = int((first + second - shared).max())
        if wide * (rows // 2) > _WORTH * width * rows or 4 * (rows // 2) * wide * wide > MASK_BYTES:
            return None
        place = torch.arange(wide)
        begin, end, total = shared[:, None], first[:, None], (first + second - shared)[:, None]
        positions = torch.where(place < end, place, place - end + begin)
        is_second = (place >= end) & (place < total)
        text = torch.where(is_second, 1, 0)
        packed = ids[torch.arange(rows // 2)[:, None], text, positions.clamp_max(width - 1)]
        # Causal, but the rest of B does not see the rest of A. Pads see something, or their softmax would be nan.
        of_first = (place >= begin) & (place < end)
        allowed = (place[:, None] >= place)[None] & ~((place >= end)[:, :, None] & of_first[:, None, :])
        plain = torch.arange(width)
        columns = torch.stack([plain.expand(rows // 2, -1), torch.where(plain < begin, plain, plain - begin + end)], 1)
        columns = torch.where(is_swapped[..., None], columns.flip(1), columns)
        columns = columns.reshape(rows, width).masked_fill(batch.attention_mask == 0, 0)
        return cls(packed, positions.clamp_max(width - 1), allowed[:, None], columns)

    def inputs(self, decoder: Decoder, device: torch.device) -> dict[str, Tensor]:
        """The arguments of a pass.

        Args:
            decoder: that is run.
            device: of its first layer.

        Returns:
            Ids and positions [n, w] of half as many rows, and the mask [n, 1, w, w]: what is seen, or what is added.
        """
        mask = self.allowed
        if _attention(decoder) == "eager":  # it adds the mask, whatever that is
            dtype = _dtype(decoder)
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        return {
            "input_ids": self.input_ids.to(device),
            "attention_mask": mask.to(device),
            "position_ids": self.positions.to(device),
        }

    def unpack(self, h: Tensor) -> Tensor:
        """Values by text again.

        Args:
            h: [b / 2, w, d], or without its first dimension parted.

        Returns:
            [b, t, d]; at pads the value of some other token.
        """
        h = h.reshape(*self.input_ids.shape, h.shape[-1])
        rows = torch.arange(len(self.columns), device=h.device) // 2
        return h[rows[:, None], self.columns.to(h.device)]


def paired(decoder: Decoder, batch: Batch) -> PairedTexts | None:
    """A batch with two texts in a row, where the model takes that and it is worth it.

    Args:
        decoder: the model's decoder, not steered.
        batch: padded at the right.
    """
    longest = batch.input_ids.shape[1]
    if any(window < longest for window in _windows(decoder.body.config)):
        return None
    found = PairedTexts.of(batch)
    if found is None:
        return None
    known, way = _TAKES.setdefault(decoder.body, {}), (_attention(decoder), _dtype(decoder))
    if way not in known:
        known[way] = _takes_trees(decoder)
    return found if known[way] else None


def _windows(config: Any) -> list[int]:
    """How many tokens attention sees at most, wherever that is limited."""
    names = ("sliding_window", "attention_chunk_size", "window_size", "index_topk")
    return [value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0]


def _takes_trees(decoder: Decoder) -> bool:
    """Whether two short texts in one row leave the last block as they do in rows of their own."""
    body = decoder.body
    if decoder.entry is not body or "position_ids" not in inspect.signature(body.forward).parameters:
        return False
    if _attention(decoder) not in ("sdpa", "eager"):
        return False  # others take no mask of this shape, or read it otherwise
    ends: list[Tensor] = []
    handle = decoder.blocks[-1].register_forward_hook(lambda _module, _args, out: ends.append(tensor_of(out)))
    with plain_tokens(decoder) as known, torch.no_grad(), evaluation_mode(body):
        one, two, three = known[0].tolist()
        texts = torch.tensor([[one, two, one, three, three], [one, two, one, two, 0]], dtype=torch.long)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], dtype=torch.long)
        tree = PairedTexts.of(Batch(texts, mask, torch.tensor([3, 3], dtype=torch.long), (0, 1)))
        assert tree is not None
        try:
            body(input_ids=texts.to(known.device), attention_mask=mask.to(known.device), use_cache=False)
            body(**tree.inputs(decoder, known.device), use_cache=False)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, FitError):
            return False
        finally:
            handle.remove()
    if len(ends) != 2 or ends[1].numel() != tree.input_ids.numel() * ends[0].shape[-1]:
        return False
    apart, together = (value.float()[mask.bool()] for value in (ends[0], tree.unpack(ends[1])))
    # Token by token: what is wrong is wrong in few of them. In half precision sums in another order differ by more.
    gaps = (apart - together).norm(dim=-1) / apart.norm(dim=-1)
    return bool((gaps <= max(_CLOSE, 4 * torch.finfo(_dtype(decoder)).eps)).all())


def _attention(decoder: Decoder) -> Any:
    """How the model attends, as transformers calls it."""
    return getattr(decoder.body.config, "_attn_implementation", None)


def _dtype(decoder: Decoder) -> torch.dtype:
    """The dtype of the model's weights."""
    return next((one.dtype for one in decoder.body.parameters() if one.is_floating_point()), torch.float32)
