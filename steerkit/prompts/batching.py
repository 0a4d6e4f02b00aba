"""Padded batches of token ids: texts sorted by length, each batch as wide as its longest row.

Where a pass costs little beside its columns, batches are parted where lengths jump: fewer columns are pads.

`run_batches` is how batches are run everywhere: what does not fit into memory is run in halves.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from steerkit._support.memory import unless_too_large
from steerkit._support.processes import processes
from steerkit.errors import DataError, ModelError, near_miss
from steerkit.prompts.beginnings import beginnings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steerkit.prompts.rendering import Rendered

__all__ = ["Batch", "batches", "dealt_out", "pad_token_id", "parted", "run_batches"]

T = TypeVar("T")
_TURN = 8
"""Batches that each of several processes runs before all wait for each other."""
_PASS = 32
"""Columns that one more pass costs on a CPU, which reads all weights once more for it, however large the model is."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one forward pass, padded to the longest.

    Attributes:
        input_ids: [b, t] int64.
        attention_mask: [b, t] int64, 1 on real tokens.
        prompt_lengths: [b] int64, real prompt tokens of each row, pads not counted.
        rows: where each row stood in the input of `batches`.
        groups: how many neighbours stay together.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    rows: tuple[int, ...]
    groups: int = 1

    def parts(self, size: int) -> list[Batch]:
        """The same rows in batches of so many at most, each as wide as its longest row.

        Args:
            size: rows in a part; a group is never parted.
        """
        step = max(1, size // self.groups) * self.groups
        if len(self.rows) <= step:
            return [self]
        return [self._of(slice(start, start + step)) for start in range(0, len(self.rows), step)]

    def repeated(self, count: int) -> Batch:
        """Every row so many times, one after the other: row i of all becomes rows `count * i` and on; without groups.

        Args:
            count: 1 or more.
        """
        ids, mask, lengths = (
            one.repeat_interleave(count, dim=0) for one in (self.input_ids, self.attention_mask, self.prompt_lengths)
        )
        rows = tuple(count * row + copy for row in self.rows for copy in range(count))
        return Batch(ids, mask, lengths, rows)

    def _of(self, rows: slice) -> Batch:
        """Some of the rows, without the columns that are pads in all of them."""
        mask = self.attention_mask[rows]
        wide = mask.any(dim=0)  # pads are at one side, so what is left is one piece
        return Batch(
            self.input_ids[rows][:, wide], mask[:, wide], self.prompt_lengths[rows], self.rows[rows], self.groups
        )


def run_batches(
    work: Sequence[Batch], run: Callable[[Batch], T], *, is_split: bool = True
) -> Iterator[tuple[Batch, T]]:
    """Run batches one after the other; from one that does not fit into memory on, in batches half as large.

    Of several processes that share the work (`steerkit.split_between_processes`) each runs some of the batches, and all
    get what every batch gave.

    Args:
        work: the batches.
        run: from a batch to what it gives. It changes nothing outside of itself before it ends: a pass that failed
            leaves no trace.
        is_split: whether processes share these; else each runs all that it was given.

    Yields:
        What was run, and what it gave, in the order of `work`; together all rows, once.

    Raises:
        ModelError: a single row, or group of rows, does not fit.
    """
    several, fitting = processes() if is_split else None, _Fitting(work)
    if several is None:
        for batch in work:
            yield from fitting(batch, run)
        return
    for start in range(0, len(work), _TURN * several.count):
        turn = work[start : start + _TURN * several.count]
        shares = dealt_out(len(turn), several.count)
        mine = [turn[place] for place in shares[several.rank]]

        def ran(mine: Sequence[Batch] = mine) -> list[list[tuple[Batch, T]]]:
            return [list(fitting(batch, run)) for batch in mine]

        found = several.gathered(ran, (len(work), start, *(batch.rows for batch in turn)))
        placed = {
            place: one
            for places, of_process in zip(shares, found, strict=True)
            for place, one in zip(places, of_process, strict=True)
        }
        for place in range(len(turn)):
            yield from placed[place]


def dealt_out(count: int, hands: int) -> list[list[int]]:
    """Deal batches out to processes, there and back (0 1, 1 0, ...): they are sorted by length.

    Args:
        count: batches, the longest first.
        hands: processes.

    Returns:
        By process the numbers of its batches, rising.
    """
    order = [*range(hands), *reversed(range(hands))]
    return [[place for place in range(count) if order[place % len(order)] == hand] for hand in range(hands)]


class _Fitting:
    """Runs batches in parts that fit into memory.

    Args:
        work: all batches.
    """

    def __init__(self, work: Sequence[Batch]) -> None:
        self._size = max((len(batch.rows) for batch in work), default=0)

    def __call__(self, batch: Batch, run: Callable[[Batch], T]) -> Iterator[tuple[Batch, T]]:
        left = deque([batch])
        while left:
            part, *rest = left.popleft().parts(self._size)
            left.extendleft(reversed(rest))
            found = unless_too_large(lambda part=part: run(part))  # type: ignore[misc]
            if found is not None:
                yield part, found[0]
                continue
            rows, tokens = part.input_ids.shape
            if rows <= part.groups:
                raise ModelError(
                    f"a text of {tokens} tokens does not fit into memory even alone; give shorter ones, or load the "
                    "model with dtype bfloat16, quantize 4bit, device_map auto or on another device"
                )
            self._size = max(part.groups, rows // 2)
            warnings.warn(f"{rows} rows a pass do not fit into memory; going on with {self._size}", stacklevel=3)
            left.appendleft(part)


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
    length: Callable[[Rendered], int] | None = None,
    alike: bool = False,
    device: torch.device | None = None,
) -> list[Batch]:
    """Sort by length, longest first so that memory peaks at once, and pad each batch to its longest row.

    Args:
        rendered: what to batch; equal lengths keep their order.
        batch_size: rows in a batch, at most; a group is never parted, even where it is larger.
        pad_id: the id to pad with, see `pad_token_id`.
        side: where the pads go.
        groups: how many neighbours stay together in one batch: with 2, items 2i and 2i+1.
        length: what is sorted by; None takes the number of tokens.
        alike: keep those together that begin alike (`steerkit.prompts.beginnings`), before lengths are looked at.
        device: where they run, if batches are to be parted where that saves columns (`parted`); not those that are kept
            together.

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
    sizes = [len(one.ids) if length is None else length(one) for one in rendered]
    together.sort(key=lambda group: -max(sizes[row] for row in group))
    if alike:
        begun = beginnings([tuple(rendered[group[0]].ids) for group in together])
        first = {ids: place for place, ids in reversed(list(enumerate(begun)))}
        together = [group for _, group in sorted(zip(begun, together, strict=True), key=lambda one: first[one[0]])]
    widths = [max(sizes[row] for row in group) for group in together]
    return [
        _pad(rendered, [row for place in places for row in together[place]], pad_id, side, groups)
        for places in parted(widths, max(1, batch_size // groups), None if alike else device)
    ]


def parted(widths: Sequence[int], largest: int, device: torch.device | None = None) -> list[range]:
    """Part rows, the widest first, into passes that are each as wide as their first row.

    Args:
        widths: columns of each row, falling.
        largest: rows in a pass, at most.
        device: where the passes run. On a CPU, whose time goes into columns, there may be more passes than needed: as
            many as make columns, and what passes cost beside them, fewest. Elsewhere, or where none is given, there are
            as few as can be.

    Returns:
        The rows of each pass.

    Example:
        >>> parted([90, 89, 60, 59], 4, torch.device("cpu"))
        [range(0, 2), range(2, 4)]
        >>> parted([90, 89, 60, 59], 4)
        [range(0, 4)]
    """
    count = len(widths)
    if device is None or device.type != "cpu":
        return [range(start, min(start + largest, count)) for start in range(0, count, largest)]
    costs, starts = [0], [0]  # of the first 1, 2, ... rows: the fewest columns, and where the last pass begins
    for end in range(1, count + 1):
        cost, start = min(
            (costs[start] + _PASS + (end - start) * widths[start], start) for start in range(max(0, end - largest), end)
        )
        costs.append(cost)
        starts.append(start)
    found, end = [], count
    while end:
        found.append(range(starts[end], end))
        end = starts[end]
    return found[::-1]


def _pad(rendered: Sequence[Rendered], rows: list[int], pad_id: int, side: str, groups: int) -> Batch:
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
    return Batch(input_ids, attention_mask, lengths, tuple(rows), groups)
