"""Padded batches of token ids: texts sorted by length, each batch as wide as its longest row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from steerkit.errors import DataError, near_miss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steerkit.prompts.rendering import Rendered

__all__ = ["Batch", "batches", "pad_token_id"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one forward pass, padded to the longest.

    Attributes:
        input_ids: [b, t] int64.
        attention_mask: [b, t] int64, 1 on real tokens.
        prompt_lengths: [b] int64, real prompt tokens of each row, pads not counted.
        rows: where each row stood in the input of `batches`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    rows: tuple[int, ...]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's own, else its EOS, else 0. Pads are masked; the tokenizer is not changed."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def batches(
    rendered: Sequence[Rendered],
    batch_size: int,
    *,
    pad_id: int,
    side: Literal["right", "left"] = "right",
    groups: int = 1,
) -> list[Batch]:
    """Sort by length, longest first so that memory peaks at once, and pad each batch to its longest row.

    Args:
        rendered: what to batch; equal lengths keep their order.
        batch_size: rows in a batch, at most; a group is never parted, even where it is larger.
        pad_id: the id to pad with, see `pad_token_id`.
        side: where the pads go.
        groups: how many neighbours stay together in one batch: with 2, items 2i and 2i+1.

    Returns:
        The batches. Together their `rows` are every index of `rendered` once.

    Raises:
        DataError: when `batch_size` or `groups` is below 1, `groups` does not divide the number of items, or `side` is
            neither right nor left.
    """
    if batch_size < 1 or groups < 1:
        raise DataError(f"batch_size and groups are 1 or more, got {batch_size} and {groups}")
    if len(rendered) % groups:
        raise DataError(f"{len(rendered)} items cannot be put into groups of {groups}")
    if side not in ("right", "left"):
        raise DataError(f"padding side {side!r}; {near_miss(side, ('right', 'left'))}")
    together = [range(start, start + groups) for start in range(0, len(rendered), groups)]
    together.sort(key=lambda group: -max(len(rendered[row].ids) for row in group))
    per_batch = max(1, batch_size // groups)
    return [
        _pad(rendered, [row for group in together[start : start + per_batch] for row in group], pad_id, side)
        for start in range(0, len(together), per_batch)
    ]


def _pad(rendered: Sequence[Rendered], rows: list[int], pad_id: int, side: Literal["right", "left"]) -> Batch:
    """One batch of the given rows."""
    width = max(len(rendered[row].ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids = rendered[row].ids
        start = width - len(ids) if side == "left" else 0
        input_ids[index, start : start + len(ids)] = torch.tensor(ids, dtype=torch.int64)
        attention_mask[index, start : start + len(ids)] = 1
    lengths = torch.tensor([rendered[row].prompt_length for row in rows], dtype=torch.int64)
    return Batch(input_ids, attention_mask, lengths, tuple(rows))
