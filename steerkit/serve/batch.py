"""`Batch`: rows that share one cache and take their steps together.

Rows are padded at the left, so that all end in one column. A row that comes is read in a pass of its own, and its cache
joined; one that has ended leaves at once, with the columns that were padding for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steerkit.serve import caches
from steerkit.serve.choosing import choose
from steerkit.serve.passes import Pass, Passes, Under
from steerkit.serve.prefixes import NOTHING, Known, Prefixes
from steerkit.serve.row import Row
from steerkit.steering.repeated import Repeated

__all__ = ["Batch"]


class Batch:
    """Rows under way.

    Args:
        passes: runs the model.
        rows: of it.
        cache: what has been read of each.
        is_open: whether others may join; else its rows stay together until all have ended.

    Attributes:
        rows: those that have not ended.
    """

    def __init__(self, passes: Passes, rows: Sequence[Row], cache: Any, *, is_open: bool) -> None:
        self._passes, self.rows, self.cache, self.is_open = passes, list(rows), cache, is_open
        self._under: Under | None = None
        self._mask: Tensor | None = None
        self._positions: Tensor | None = None

    @classmethod
    def read(
        cls, passes: Passes, rows: Sequence[Row], pad: int, *, known: Known = NOTHING, is_open: bool
    ) -> tuple[Batch, Pass]:
        """Read the texts of rows, all in one pass; those that are the same, once.

        Args:
            passes: runs the model.
            rows: none of which has been read. One alone may go on from what is known of its text.
            pad: id to pad with.
            known: what of a single row's text has been read.
            is_open: whether others may join them.

        Returns:
            The rows, and what their last column gave.
        """
        repeated = Repeated.of([(tuple(row.ids), row.steering.key, row.probe) for row in rows])
        read = [rows[place] for place in repeated.firsts]
        start = known.tokens
        texts = [row.ids[start:] for row in read]
        width = max(map(len, texts))
        ids = torch.tensor([[pad] * (width - len(one)) + one for one in texts], device=passes.device, dtype=torch.long)
        lengths = [len(one) for one in texts]
        mask = _mask(lengths, width, passes.device)
        positions = torch.arange(width, device=passes.device).expand(len(read), -1)
        if mask is not None:
            positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        held = [row.ids[:start] for row in read]
        steerings, prompts = [row.steering for row in read], [row.prompt_length for row in read]
        under = passes.under(steerings, prompts, held, [len(row.ids) for row in read])
        probes = [row.probe for row in read if row.probe is not None]
        found = passes.run(under, ids, mask=mask, positions=positions + start, cache=known.cache, probes=probes)
        batch = cls(passes, rows, found.cache, is_open=is_open)
        if repeated.any:
            batch.cache = caches.kept_rows(found.cache, repeated.places, max(len(row.ids) for row in rows))
            again = repeated.again.to(passes.device)
            readings = {probe: values[again.to(values.device)] for probe, values in found.readings.items()}
            found = Pass(found.logits[again.to(found.logits.device)], batch.cache, readings)
        else:
            batch._under = under  # a gate's decision stays with it
        return batch, found

    def step(self) -> None:
        """Read the last token of each row and choose its next one."""
        rows, device = self.rows, self._passes.device
        cached = [len(row.ids) - 1 for row in rows]
        if self._under is None:
            steerings, prompts = [row.steering for row in rows], [row.prompt_length for row in rows]
            self._under = self._passes.under(steerings, prompts, [row.ids[:-1] for row in rows])
        if self._positions is None:
            self._positions = torch.tensor(cached, device=device, dtype=torch.long)[:, None]
            self._mask = _mask(cached, max(cached), device)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows), 1)], dim=1)
        ids = torch.tensor([[row.ids[-1]] for row in rows], device=device, dtype=torch.long)
        probes = [row.probe for row in rows if row.probe is not None]
        found = self._passes.run(
            self._under, ids, mask=self._mask, positions=self._positions, cache=self.cache, probes=probes
        )
        self.cache, self._positions = found.cache, self._positions + 1
        choose(rows, found)

    def join(self, others: Sequence[Batch]) -> None:
        """Take in the rows of other batches.

        Args:
            others: open ones, which have rows.
        """
        taken = [one for one in (self, *others) if one.rows]
        if not others or not taken:
            return
        self.cache = taken[0].cache if len(taken) == 1 else caches.joined([one.cache for one in taken])
        self.rows = [row for one in taken for row in one.rows]
        self._changed()

    def leave(self, prefixes: Prefixes) -> None:
        """Let the rows go that have ended.

        Args:
            prefixes: take what a later prompt may go on from.
        """
        stay = [place for place, row in enumerate(self.rows) if row.finish is None]
        if len(stay) == len(self.rows):
            return
        for place, row in enumerate(self.rows):
            if self.is_open and row.leader is None and row.finish not in (None, "error"):
                self._keep(place, row, prefixes)
        self.rows = [self.rows[place] for place in stay]
        if not self.rows:
            self.cache = None
        elif self.is_open:
            self.cache = caches.kept_rows(self.cache, stay, max(len(row.ids) for row in self.rows) - 1)
        self._changed()

    def _keep(self, place: int, row: Row, prefixes: Prefixes) -> None:
        """Keep the part of a row's text that a longer prompt would be steered in the same way in."""
        length = len(row.ids) - 1  # the last token was never read
        columns = row.steering.settled(row.prompt_length, length)
        ids = row.ids[:columns]
        if columns < 1 or not prefixes.budget or prefixes.knows(row.steering.key, ids):
            return
        cache = caches.cut(self.cache, place, length, columns)
        if cache is not None:
            prefixes.keep(row.steering.key, ids, cache)

    def _changed(self) -> None:
        """Forget what was laid out for the rows as they were."""
        self._under = self._mask = self._positions = None


def _mask(lengths: Sequence[int], width: int, device: torch.device) -> Tensor | None:
    """[b, width] 1 on the last so many columns of each row; None where that is all of them."""
    if min(lengths) == width:
        return None
    starts = torch.tensor([width - length for length in lengths], device=device, dtype=torch.long)
    return (torch.arange(width, device=device) >= starts[:, None]).long()
