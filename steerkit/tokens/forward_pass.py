"""`Pass`: what is known about the tokens of one forward pass, and the question which of them a scope means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerkit.errors import ScopeError
from steerkit.tokens.written import Tokens

if TYPE_CHECKING:
    from steerkit.tokens.decoding import Decoding
    from steerkit.tokens.generate_call import GenerateCall
    from steerkit.tokens.scope import PromptLengths, Scope

__all__ = ["PACKED", "Pass", "Tokens"]

PACKED = "several texts share a row of this pass (packed, or batched continuously), so their ends are not known"


class Pass:
    """The facts of one forward pass.

    Columns count from the left edge of the padded sequence, the cached part included; positions count from each row's
    first real token.

    Attributes:
        batch: rows.
        width: columns t that this pass carries.
        past: columns before them, in the cache: a number, or the cache's counter [] where only the device knows.
        boundary: the first column after the prompt, None where this pass cannot tell, or rows differ.
        ends: [b, 1] the first column after each row's prompt, where rows differ and a loop of the caller's told.
        decode: this pass is one decoding step of `generate` or such a loop (all rows are past their prompt).
        expands: this pass may hold several rows of one item (beams, returned sequences).
        rows: which items the rows are, where a reader sorted them; None where they are as given.
        only_all: why only scope `all` is known in this pass, if so.
        suspended: nothing is to be written in this pass.
        store: what is kept from pass to pass of one text: it lives with the `generate` call, else with the cache, else
            with this pass.
        held: whose writes wait in this pass, because what decides about them is read later in it.
        is_probe: this pass is run only to be read, beside the one that was asked for.
        is_apart: inside a `generate` call this pass is of another text than the call's (guidance's negative prompt).
        given: [b, t] token ids of this pass; None where it was given embeddings.
        call: the `generate` call whose text it belongs to.
        decoding: the loop of the caller's that it belongs to.
        cache: its cache, inside such a call or loop.
        is_compiled: whether it was noted by compiled code, which keeps nothing from pass to pass.
    """

    def __init__(
        self,
        *,
        batch: int,
        width: int,
        past: int | Tensor,
        device: torch.device,
        attention: Tensor | None = None,
        real: Tensor | None = None,
        first: Tensor | None = None,
        boundary: int | None = None,
        decode: bool = False,
        expands: bool = True,
        rows: tuple[int, ...] | None = None,
        only_all: str | None = None,
        suspended: bool = False,
        position_ids: Tensor | None = None,
        store: dict[Any, Any] | None = None,
        held: tuple[Any, ...] = (),
        is_probe: bool = False,
        is_apart: bool = False,
        given: Tensor | None = None,
        call: GenerateCall | None = None,
        cache: Any = None,
        ends: Tensor | None = None,
        decoding: Decoding | None = None,
        is_compiled: bool = False,
    ) -> None:
        self.batch, self.width, self.past, self.device = batch, width, past, device
        self.boundary, self.decode, self.expands = boundary, decode, expands
        self.rows, self.only_all, self.suspended = rows, only_all, suspended
        self.store: dict[Any, Any] = {} if store is None else store
        self.held, self.is_probe, self.is_apart = held, is_probe, is_apart
        self.settled = False  # whether it has been seen to that what decides is read in time
        self.replay: Any = None
        self._attention, self._real, self._first, self._position_ids = attention, real, first, position_ids
        self.given, self.call, self.cache, self.is_compiled = given, call, cache, is_compiled
        self.ends, self.decoding = ends, decoding
        self.is_kept = False  # whether its ids have been added to those of its text
        self._tokens: dict[tuple[Scope, int, int], Tokens] = {}
        self._latest: tuple[Scope | None, PromptLengths | None, Tokens | None] = (None, None, None)

    @property
    def columns(self) -> Tensor:
        """[t] column of every token of this pass."""
        return torch.arange(self.width, device=self.device) + self.past

    @property
    def real(self) -> Tensor | None:
        """[b, t] True where a token is no pad; None where every token of this pass is real."""
        if self._real is None and self._attention is not None and not self.decode:
            self._real = _columns_of(self._attention, self.past, self.width) != 0
        return self._real

    @property
    def first(self) -> Tensor | None:
        """[b] column of every row's first real token; None where no row starts with a pad."""
        if self._first is None and self._attention is not None:
            real = self._attention != 0
            # A row without a real token so far (the first chunk of a padded row) starts later than all columns.
            self._first = torch.where(real.any(dim=1), real.long().argmax(dim=1), real.shape[1])
        return self._first

    @property
    def position(self) -> Tensor:
        """[b, t] place of every token counted from its row's first real token."""
        columns = self.columns[None, :].expand(self.batch, -1)
        return columns if self.first is None else columns - self.first[:, None]

    def expand(self, values: Tensor, what: str) -> Tensor:
        """One value per row of this pass, from one value per item.

        Args:
            values: [items, ...].
            what: the argument's name, for the error.

        Returns:
            [b, ...]; each value repeated for the adjacent rows that beams and returned sequences make of its item.

        Raises:
            ScopeError: the rows of this pass do not fit the number of values.
        """
        items = values.shape[0]
        if self.rows is not None:
            if max(self.rows) >= items:
                raise ScopeError(f"{what}: got {items} values for more items than that; give one per item")
            return values[list(self.rows)]
        if items == self.batch:
            return values
        if self.batch % items or not self.expands:
            raise ScopeError(f"{what}: got {items} values for a pass of {self.batch} rows; give one per row")
        return values.repeat_interleave(self.batch // items, dim=0)

    def tokens(self, scope: Scope, lengths: PromptLengths | None = None) -> Tokens:
        """Answer which tokens of this pass a scope means.

        Args:
            scope: the scope asked for.
            lengths: real prompt tokens per row, where the caller knows them.

        Raises:
            ScopeError: the scope depends on something this pass cannot tell.
        """
        if torch.compiler.is_compiling():  # which is made again for every object that is told by its number
            return Tokens(self, scope, lengths)
        asked, of, latest = self._latest  # all sites of a vector ask the same, one after the other
        if latest is not None and asked is scope and of is lengths:
            return latest
        key = (scope, id(lengths), id(scope.marks))
        found = self._tokens.get(key)
        if found is None:
            found = self._tokens[key] = Tokens(self, scope, lengths)
        self._latest = (scope, lengths, found)
        return found

    def check(self, scope: Scope) -> None:
        """Refuse a scope other than `all` in a pass where nothing else is known.

        Args:
            scope: any but `all`.

        Raises:
            ScopeError: with the reason.
        """
        reason, ids = self.only_all, self._position_ids
        if reason is None and ids is not None and ids.shape[-1] > 1 and not torch.compiler.is_compiling():
            # One synchronisation per scoring pass of a single unpadded row; never in a decoding step.
            reason = PACKED if bool((ids[..., 1:] <= ids[..., :-1]).any()) else None
        if reason is not None:
            raise ScopeError(f"scope '{scope}': {reason}{scope.instead('; ', 'all')}")


def _columns_of(mask: Tensor, past: int | Tensor, width: int) -> Tensor:
    """The part [b, t] of a 2-D attention mask that belongs to the columns of this pass."""
    length = mask.shape[1]
    if isinstance(past, int):
        # A mask that covers only the new columns is shorter than past + width.
        start = past if length >= past + width else length - width
        return mask[:, start : start + width]
    return mask.index_select(1, torch.arange(width, device=mask.device) + past)
