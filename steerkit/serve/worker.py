"""`Worker`: what the engine's thread does between two looks at the line: plan, admit, read, step.

All of it belongs to that thread. Rows that cannot share a cache (gated vectors, whose decision belongs to one text;
models that are more than attention) run in batches of their own, which take their steps in turn.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import nn

from steerkit.errors import DataError, SteerError
from steerkit.generation import AnswerText
from steerkit.prompts.batching import pad_token_id
from steerkit.serve.batch import Batch
from steerkit.serve.catalogue import Catalogue
from steerkit.serve.choosing import choose, follow
from steerkit.serve.events import Finish
from steerkit.serve.joinable import can_join
from steerkit.serve.passes import Passes
from steerkit.serve.prefixes import NOTHING, Known, Prefixes
from steerkit.serve.probe import Probe
from steerkit.serve.row import Row, Ticket
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Worker", "end_rows"]

logger = logging.getLogger(__name__)

_WIDEST = 16_384  # tokens of one pass over prompts, pads included, unless one prompt alone has more


class Worker:
    """Runs rows.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer; never changed.
        catalogue: the vectors that requests may name.
        max_batch: rows under way at most.
        prefix_bytes: room for what was read of earlier texts; 0 keeps nothing.

    Attributes:
        passes: of the model.
        prefixes: what is kept.
        counts: of prompt tokens, of those that were known already, and of generated tokens.
        joins: whether rows of this model share a cache.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, catalogue: Catalogue, *, max_batch: int, prefix_bytes: int
    ) -> None:
        self.passes, self.prefixes = Passes(model, tokenizer), Prefixes(prefix_bytes)
        self.counts = {"prompt_tokens": 0, "cached_tokens": 0, "tokens": 0}
        self.joins = False
        self._catalogue, self._max_batch, self._tokenizer = catalogue, max_batch, tokenizer
        self._pad, self._decode, self._ends = pad_token_id(tokenizer), AnswerText(tokenizer), _ends(model, tokenizer)
        self._open = Batch(self.passes, [], None, is_open=True)
        self._apart: list[Batch] = []
        self._probes: dict[str, Probe] = {}

    @property
    def running(self) -> int:
        """Rows under way."""
        return sum(len(one.rows) for one in (self._open, *list(self._apart)))

    def begin(self) -> None:
        """Find out whether rows of this model may share a cache.

        Raises:
            ModelError: the model cannot be run step by step.

        Warns:
            UserWarning: they may not.
        """
        self.joins = can_join(self.passes)
        if not self.joins:
            warnings.warn(
                f"{type(self.passes.decoder.model).__name__} keeps more of a text than keys and values, so requests "
                "take their steps one after the other and share no pass",
                stacklevel=1,
            )

    def plan(self, ticket: Ticket) -> list[list[Row]]:
        """The rows of a request: those that have to run together in one group.

        Args:
            ticket: the request.

        Raises:
            DataError: the prompt is too short for what is written in it.
            SteerError: its steering cannot be had.
        """
        request, plans = ticket.request, self.passes.plans
        steering, unsteered = plans.add(ticket.vectors), plans.unsteered
        if steering.minimum_prompt > len(ticket.ids):
            raise DataError(
                f"the prompt has {len(ticket.ids)} tokens, and its steering writes the first {steering.minimum_prompt}"
            )
        for vector in ticket.vectors:
            vector.check_template(self._tokenizer)
        probe = self._probe(request.probe)
        groups = []
        for choice in range(request.n):
            row = Row(ticket, choice, steering, decode=self._decode, ends=self._ends, probe=probe)
            groups.append([row])
            if request.kl and steering.vectors:
                groups[-1].append(Row(ticket, choice, unsteered, decode=self._decode, ends=self._ends, leader=row))
        return groups

    def _probe(self, asked: SteeringVector | str | None) -> Probe | None:
        """What reads tokens along a vector, made once for each name."""
        if asked is None or isinstance(asked, SteeringVector):
            return None if asked is None else Probe(self.passes.model, "probe", asked, self._tokenizer)
        if asked not in self._probes:
            vector = self._catalogue.vector(asked)
            self._probes[asked] = Probe(self.passes.model, asked, vector, self._tokenizer)
        return self._probes[asked]

    def admit(self, line: deque[list[Row]]) -> None:
        """Read the prompts of those there is room for, and let them join.

        Args:
            line: groups of rows that wait; those that are read leave it.
        """
        fresh: list[Row] = []
        while line and self.running + len(fresh) + len(line[0]) <= self._max_batch:
            group = line[0]
            if (len(fresh) + len(group)) * max(len(row.ids) for row in [*fresh, *group]) > _WIDEST and fresh:
                break
            line.popleft()
            if group[0].ticket.is_cancelled:
                end_rows(group, "cancelled")
            elif not self.joins or any(row.steering.is_gated for row in group):
                self._read(group, is_open=False)
            elif len(group) == 1 and self._go_on(group[0]):
                continue
            else:
                fresh += group
        if fresh:
            self._read(fresh)

    def _go_on(self, row: Row) -> bool:
        """Read the rest of a prompt of which a beginning is known; False where none is."""
        known = self.prefixes.find(row.steering.key, row.ids)
        row.cached = known.tokens
        if known.tokens:
            self._read([row], known=known)
        return known.tokens > 0

    def _read(self, rows: list[Row], *, known: Known = NOTHING, is_open: bool = True) -> None:
        """Read texts; where that fails, each alone, so that one request does not end another."""
        try:
            batch, found = Batch.read(self.passes, rows, self._pad, known=known, is_open=is_open)
            choose(rows, found)
        except Exception as error:  # noqa: BLE001 - the rows' requests get it, and the others go on
            self.passes.release()
            groups = _together(rows)
            if len(groups) == 1:
                end_rows(rows, "error", _line(error))
                return
            for group in groups:
                self._read(group, is_open=is_open)
            return
        self.counts["prompt_tokens"] += sum(row.prompt_length for row in rows if row.generated == 1 and not row.leader)
        self.counts["cached_tokens"] += sum(row.cached for row in rows if row.generated == 1)
        self.counts["tokens"] += sum(row.leader is None for row in rows)
        batch.leave(self.prefixes)
        if is_open:
            self._open.join([batch])
        elif batch.rows:
            self._apart.append(batch)

    def step(self) -> None:
        """One step of every batch; cancelled rows go before it, those that have ended behind it."""
        for batch in (self._open, *self._apart):
            for row in batch.rows:
                if row.ticket.is_cancelled:
                    row.end("cancelled")
            follow(batch.rows)
            batch.leave(self.prefixes)
            if not batch.rows:
                continue
            self.counts["tokens"] += sum(row.leader is None for row in batch.rows)
            try:
                batch.step()
            except Exception as error:  # noqa: BLE001 - the rows' requests get it, and the engine goes on
                self._again(batch, error)
            batch.leave(self.prefixes)
        self._apart = [batch for batch in self._apart if batch.rows]

    def _again(self, batch: Batch, error: Exception) -> None:
        """Read the rows of a step that failed once more, each with its answer so far: the step left half of a cache.

        So a row that a pass cannot bear ends alone. A gate's decision cannot be had again; its row ends.
        """
        self.passes.release()
        if not batch.is_open:
            end_rows(batch.rows, "error", _line(error))
            return
        rows, self._open = batch.rows, Batch(self.passes, [], None, is_open=True)
        batch.rows = []
        self._read(rows)

    def close(self) -> None:
        """End all rows, and leave the model as it was."""
        self.passes.release()
        for batch in (self._open, *self._apart):
            end_rows(batch.rows, "cancelled")
        self._open, self._apart = Batch(self.passes, [], None, is_open=True), []
        self.prefixes.clear()


def end_rows(rows: Sequence[Row], finish: Finish, error: str | None = None) -> None:
    """End rows in one way.

    Args:
        rows: any; those that have ended stay as they are.
        finish: how.
        error: what went wrong.
    """
    for row in rows:
        row.end(finish, error)


def _together(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by the one that chooses their tokens."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(id(row.leader or row), []).append(row)
    return list(groups.values())


def _line(error: Exception) -> str:
    """An error in one line; what nobody foresaw is named by its kind alone, since it may tell of the machine."""
    if isinstance(error, SteerError):
        return str(error)
    logger.error("a pass failed", exc_info=error)
    return f"the pass failed ({type(error).__name__})"


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the model's, else the tokenizer's."""
    given: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    given = tokenizer.eos_token_id if given is None else given
    return frozenset([] if given is None else given if isinstance(given, list | tuple) else [given])
