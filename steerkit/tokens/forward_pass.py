"""TODO tokens.forward_pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from steerkit.errors import ScopeError

if TYPE_CHECKING:
    from steerkit.tokens.scope import PromptLengths, Scope
    from steerkit.tokens.transformers_facts import Call

__all__ = ["PACKED", "Pass", "Tokens"]

PACKED = "several texts share a row of this pass (packed, or batched continuously), so their ends are not known"
# What the frame that decodes calls the ids of the whole text: with candidates, of beams, else.
_IDS = "ids"  # where the ids of a text are kept among what goes with its cache


class Pass:
    """The facts of one forward pass.

    Attributes:
        batch: rows.
        width: columns this pass carries.
        past: columns before them, in the cache.
        boundary: the first column after the prompt, None where this pass cannot tell.
        decode: this pass is one decoding step of a `generate` call (all rows are past their prompt).
        expands: this pass may hold several rows of one item (beams, returned sequences).
        rows: which items the rows are, where a reader sorted them; None where they are as given.
        only_all: why only scope `all` is known in this pass, if so.
        suspended: nothing is to be written in this pass.
        store: what is kept from pass to pass of one text: it lives with the `generate` call, else with the cache, else
            with this pass.
        held: whose writes wait in this pass, because what decides about them is read later in it.
        is_probe: this pass is run only to be read, beside the one that was asked for.
        is_apart: inside a `generate` call this pass is of another text than the call's (guidance's negative prompt).
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
        call: Call | None = None,
        cache: Any = None,
    ) -> None:
        self.batch, self.width, self.past, self.device = batch, width, past, device
        self.boundary, self.decode, self.expands = boundary, decode, expands
        self.rows, self.only_all, self.suspended = rows, only_all, suspended
        self.store: dict[Any, Any] = {} if store is None else store
        self.held, self.is_probe, self.is_apart = held, is_probe, is_apart
        self.settled = False  # whether it has been seen to that what decides is read in time
        self.replay: Any = None
        self._attention, self._real, self._first, self._position_ids = attention, real, first, position_ids
        self._given, self._call, self._cache = given, call, cache
        self._text: tuple[Tensor, int | Tensor] | None = None
        self._tokens: dict[tuple[Scope, int, int], Tokens] = {}

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
        key = (scope, id(lengths), id(scope.marks))
        if key not in self._tokens:
            self._tokens[key] = Tokens(self, scope, lengths)
        return self._tokens[key]

    def text(self, scope: Scope) -> tuple[Tensor, int | Tensor]:
        """The ids of the whole text so far, and the column among them at which this pass begins.

        Args:
            scope: what needs them, for the error.

        Returns:
            [b, past + t] and a number; inside compiled decoding a longer tensor and the one column of this pass.

        Raises:
            ScopeError: nobody can tell them.
        """
        if self._text is None:
            self._text = self._find_text(scope)
        return self._text

    def _find_text(self, scope: Scope) -> tuple[Tensor, int | Tensor]:
        given, past = self._given, self.past
        if given is None:
            raise ScopeError(f"scope '{scope}': this pass has no token ids (inputs_embeds); give input_ids")
        if not isinstance(past, int):
            if self._call is None or self._call.text is None or self.width > 1:
                raise ScopeError(
                    f"scope '{scope}': compiled code and static caches outside of generate do not tell the text so "
                    "far; use a dynamic cache, or pass disable_compile=True to generate()"
                )
            column = past.reshape(1)
            return self._call.text.index_copy_(1, column, given), column
        if self._call is not None:
            whole = self._text_of_call(self._call, given, past, scope)
        elif past == 0:
            whole = self.store[_IDS] = given
        else:
            kept = self.store.get(_IDS)
            if kept is None or kept.shape[0] != self.batch or kept.shape[1] < past:
                raise ScopeError(
                    f"scope '{scope}': the cache of this pass was not filled under it, so the text so far is not "
                    "known; run the whole text inside steer()"
                )
            whole = self.store[_IDS] = torch.cat([kept[:, :past], given], dim=1)
        return whole, past

    def _text_of_call(self, call: Call, given: Tensor, past: int, scope: Scope) -> Tensor:
        whole: Tensor | None = given
        if past > 0:
            whole = None if call.starts_late or call.running is None else call.running()
        if whole is None or whole.shape[0] != self.batch or whole.shape[1] < past + self.width:
            raise ScopeError(
                f"scope '{scope}': this generate call does not tell the ids of the text so far; give it the whole "
                "text and not only what is new, and one of transformers' own ways to decode"
            )
        whole = whole[:, : past + self.width].to(self.device)
        if not self.decode and getattr(self._cache, "is_compileable", False):
            call.keep_text(whole)
        return whole

    def check(self, scope: Scope) -> None:
        """Refuse a scope other than `all` in a pass where nothing else is known.

        Raises:
            ScopeError: with the reason.
        """
        reason, ids = self.only_all, self._position_ids
        if reason is None and ids is not None and ids.shape[-1] > 1 and not torch.compiler.is_compiling():
            # One synchronisation per scoring pass of a single unpadded row; never in a decoding step.
            reason = PACKED if bool((ids[..., 1:] <= ids[..., :-1]).any()) else None
        if reason is not None:
            raise ScopeError(f"scope '{scope}': {reason}; use scope='all'")


class Tokens:
    """The tokens of one pass as one scope sees them; what a method's `edit` receives.

    Attributes:
        nothing: no token of this pass is written.
        written: [b, t] True where a token is written; None where all are.
    """

    def __init__(self, facts: Pass, scope: Scope, lengths: PromptLengths | None) -> None:
        self._pass, self.scope, self._lengths = facts, scope, lengths
        chosen = self._choose()
        self.nothing = chosen is False
        self.written: Tensor | None = None if isinstance(chosen, bool) else chosen

    @property
    def position(self) -> Tensor:
        """[b, t] place of every token counted from its row's first real token."""
        return self._pass.position

    @property
    def prompt_length(self) -> Tensor:
        """[b, 1] real prompt tokens of every row; the whole row where nobody said where the prompt ends."""
        facts = self._pass
        if self._lengths is not None:
            return self._lengths.on(facts)[:, None]
        first: Tensor | int = 0 if facts.first is None else facts.first[:, None]
        if facts.boundary is None and facts.real is not None:
            return facts.real.sum(dim=1, keepdim=True)
        end = facts.past + facts.width if facts.boundary is None else facts.boundary
        return torch.zeros(facts.batch, 1, dtype=torch.long, device=facts.device) + end - first

    @property
    def is_decoding(self) -> bool:
        """Whether this pass is one decoding step of a `generate` call."""
        return self._pass.decode

    @property
    def moves_rows(self) -> bool:
        """Whether rows may change places between the passes of this text, as beams do."""
        call = self._pass._call
        return call is not None and (getattr(call.settings, "num_beams", 1) or 1) > 1

    @property
    def columns(self) -> tuple[int | Tensor, int]:
        """Columns before this pass, and columns in it."""
        return self._pass.past, self._pass.width

    @property
    def goes_on(self) -> bool:
        """Whether this pass holds tokens behind the prompt, or nobody can tell."""
        past, end = self._pass.past, self._pass.boundary
        return self._lengths is not None or end is None or (isinstance(past, int) and past + self._pass.width > end)

    def last_prompt(self) -> Tensor | None:
        """Where each row's last prompt token stands in this pass.

        Returns:
            [b] index into the pass, -1 where a row has no token; None where the prompt does not end in this pass.

        Raises:
            ScopeError: nobody can tell where the prompt ends, or it ends in a later pass than the first one.
        """
        facts, end = self._pass, self._known_end()
        past = facts.past if isinstance(facts.past, int) else int(facts.past)
        if isinstance(end, Tensor):
            if past > 0:
                return None
            index = end[:, 0] - 1
            if bool((index >= facts.width).any()):
                raise ScopeError("prompt_lengths: the prompts have to end in the first pass; give it the whole prompts")
            return index
        if not past < end <= past + facts.width:
            return None
        index = torch.full((facts.batch,), end - 1 - past, device=facts.device)
        if facts.real is None:
            return index
        place = torch.arange(facts.width, device=facts.device)
        return torch.where(facts.real & (place <= index[:, None]), place, -1).amax(dim=1)

    def in_prompt(self, start: int = 0) -> Tensor:
        """Which tokens of this pass a mean over the prompt counts: real ones, without each row's first.

        Args:
            start: columns before this one count no more.

        Returns:
            [b, t] bool.

        Raises:
            ScopeError: nobody can tell where the prompt ends.
        """
        facts, end = self._pass, self._known_end()
        columns = facts.columns[None, :]
        return _both((columns < end) & (columns >= start) & (facts.position > 0), facts.real)

    def _known_end(self) -> int | Tensor:
        self._pass.check(self.scope)
        end = self._end()
        if end is None:
            raise ScopeError(
                "a gate decides at the prompt's end, and this forward pass cannot tell where that is (only `generate` "
                "can); pass prompt_lengths= (real prompt tokens of each row) to steer()"
            )
        return end

    def require_prompt(self, count: int) -> None:
        """Refuse a prompt shorter than the window to be written.

        Looks in the passes that hold prompt (one, or a few chunks) and costs one synchronisation in each.

        Raises:
            ScopeError: a row's prompt has fewer real tokens than `count`.
        """
        past, end = self._pass.past, self._pass.boundary or 1
        if self._pass.decode or torch.compiler.is_compiling() or not isinstance(past, int) or past >= end:
            return
        shortest = int(self.prompt_length.min())
        if shortest < count:
            raise ScopeError(
                f"scope '{self.scope}': the vector covers {count} prompt positions but a prompt of this batch has "
                f"{shortest} tokens; use a longer prompt or a shorter pair"
            )

    def _choose(self) -> Tensor | bool:
        """The mask [b, t], True for every token, False for none."""
        facts, scope = self._pass, self.scope
        if scope.kind == "all":
            return _mask_or_all(facts.real)
        facts.check(scope)
        if scope.kind == "first":
            return self._choose_first(scope.count)
        if scope.is_by_role:
            return self._choose_role()
        if facts.decode and self._lengths is None:
            return scope.kind in ("response", "generated")
        end = self._end()
        if end is None and scope.needs_prompt_end:
            raise ScopeError(
                f"scope '{scope}': this forward pass cannot tell where the prompt ends (only `generate` can); pass "
                "prompt_lengths= (real prompt tokens of each row) to steer(), or use scope='all' or 'first(n)'"
            )
        if end is None or scope.kind in ("front", "mid", "back"):
            past_prompt = isinstance(facts.past, int) and isinstance(end, int) and facts.past >= end
            return False if past_prompt else _mask_or_all(facts.real)
        return self._choose_side(scope.kind, end)

    def _choose_first(self, count: int) -> Tensor | bool:
        facts = self._pass
        if facts.first is None and isinstance(facts.past, int):
            if facts.past >= count:
                return False
            if facts.past + facts.width <= count:
                return _mask_or_all(facts.real)
        return _both(facts.position < count, facts.real)

    def _choose_role(self) -> Tensor:
        facts, scope = self._pass, self.scope
        assert scope.marks is not None
        ids, start = facts.text(scope)
        written = scope.marks.written(scope.kind, scope.count, ids)
        here = written[:, start:] if isinstance(start, int) else written.index_select(1, start)
        return _both(here, facts.real)

    def _choose_side(self, kind: str, end: int | Tensor) -> Tensor | bool:
        facts = self._pass
        start = end - 1 if kind == "response" else end
        if isinstance(start, int) and isinstance(facts.past, int):
            before, after = facts.past + facts.width <= start, facts.past >= start
            if before or after:
                return _mask_or_all(facts.real) if after == (kind != "prompt") else False
        late = facts.columns[None, :] >= start
        side = ~late if kind == "prompt" else late
        return _both(side.expand(facts.batch, -1), facts.real)

    def _end(self) -> int | Tensor | None:
        """First column after the prompt: one number, [b, 1] of them, or None where nobody knows."""
        facts = self._pass
        if self._lengths is None:
            return facts.boundary
        ends = self._lengths.on(facts)[:, None]
        self._check_lengths(ends)
        return ends if facts.first is None else ends + facts.first[:, None]

    def _check_lengths(self, lengths: Tensor) -> None:
        """Refuse prompts longer than their rows, where looking costs no step of a decoding loop.

        Raises:
            ScopeError: with the row's two lengths.
        """
        facts = self._pass
        if torch.compiler.is_compiling() or facts.decode or facts.width == 1:
            return
        if not isinstance(facts.past, int) or facts.past > 0:
            return
        held = facts.width if facts.real is None else facts.real.sum(dim=1, keepdim=True)
        too_long = (lengths > held).flatten()
        if bool(too_long.any()) and not facts.expands:
            row = int(too_long.long().argmax())
            raise ScopeError(f"prompt_lengths: got {int(lengths[row])} for row {row}, which has fewer real tokens")


def _mask_or_all(mask: Tensor | None) -> Tensor | Literal[True]:
    return True if mask is None else mask


def _both(mask: Tensor, real: Tensor | None) -> Tensor:
    return mask if real is None else mask & real


def _columns_of(mask: Tensor, past: int | Tensor, width: int) -> Tensor:
    """The part [b, t] of a 2-D attention mask that belongs to the columns of this pass."""
    length = mask.shape[1]
    if isinstance(past, int):
        # A mask that covers only the new columns is shorter than past + width.
        start = past if length >= past + width else length - width
        return mask[:, start : start + width]
    return mask.index_select(1, torch.arange(width, device=mask.device) + past)
