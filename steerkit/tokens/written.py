"""`Tokens`: which tokens of one forward pass a scope writes, as a mask [b, t] where it is not all of them or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from steerkit.errors import ScopeError
from steerkit.tokens.scope import ANSWER
from steerkit.tokens.text_so_far import written_by_role

if TYPE_CHECKING:
    from steerkit.tokens.forward_pass import Pass
    from steerkit.tokens.scope import PromptLengths, Scope

__all__ = ["Tokens"]


class Tokens:
    """The tokens of one pass as one scope sees them; what a method's `edit` receives.

    Attributes:
        nothing: no token of this pass is written.
        written: [b, t] True where a token is written; None where all are.
        mask: [b, t, 1] the same, as it is laid over activations.
    """

    def __init__(self, facts: Pass, scope: Scope, lengths: PromptLengths | None) -> None:
        self._pass, self.scope, self._lengths = facts, scope, lengths
        chosen = self._choose()
        self.nothing = chosen is False
        self.written: Tensor | None = None if isinstance(chosen, bool) else chosen
        self.mask: Tensor | None = None if self.written is None else self.written[..., None]

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
        if facts.boundary is None and facts.ends is None and facts.real is not None:
            return facts.real.sum(dim=1, keepdim=True)
        end = facts.past + facts.width if facts.boundary is None else facts.boundary
        if facts.ends is not None:
            end = facts.ends
        return torch.zeros(facts.batch, 1, dtype=torch.long, device=facts.device) + end - first

    @property
    def step(self) -> Tensor:
        """[1 or b, t] which generated token each token of this pass chooses; 0 where it chooses none.

        Raises:
            ScopeError: nobody can tell where the prompt ends.
        """
        return self._chosen("a fade counts generated tokens").clamp_min(0)

    def chosen(self, why: str) -> Tensor | None:
        """Which generated token each token of this pass chooses.

        Args:
            why: half a sentence that says what needs it, for the error.

        Returns:
            [1 or b, t], negative before the prompt's end, where none is chosen; None in a decoding step, in which every
            token chooses one, and not the first.

        Raises:
            ScopeError: nobody can tell where the prompt ends.
        """
        return None if self._pass.decode and self._lengths is None else self._chosen(why)

    def _chosen(self, why: str) -> Tensor:
        """Which of the generated tokens each position chooses [b, t], from 0; negative inside of the prompt."""
        return self._pass.columns[None, :] - (self._known_end(why) - 1)

    def chooses_from(self) -> int | None:
        """Which generated token a decoding step chooses; None where the host cannot tell."""
        past, end = self._pass.past, self._pass.boundary
        if not self._pass.decode or self._lengths is not None or end is None or not isinstance(past, int):
            return None
        return past - end + 1

    @property
    def is_decoding(self) -> bool:
        """Whether this pass is one decoding step of `generate`, or of a loop that told of its rows."""
        return self._pass.decode

    @property
    def moves_rows(self) -> bool:
        """Whether rows may change places between the passes of this text, as beams do."""
        call = self._pass.call
        return call is not None and (getattr(call.settings, "num_beams", 1) or 1) > 1

    @property
    def columns(self) -> tuple[int | Tensor, int]:
        """Columns before this pass (a number, or a cache's counter []), and columns in it."""
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
        index = torch.full((facts.batch,), end - 1 - past, device=facts.device, dtype=torch.long)
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

    def _known_end(self, why: str = "a gate decides at the prompt's end") -> int | Tensor:
        """Where the prompt ends, in columns."""
        self._pass.check(self.scope)
        end = self._end()
        if end is None:
            raise ScopeError(
                f"{why}, and this forward pass cannot tell where the prompt ends (only `generate` can); pass "
                "prompt_lengths= (real prompt tokens of each row) to steer()"
            )
        return end

    def require_prompt(self, count: int, active: Tensor | None = None) -> None:
        """Refuse a prompt shorter than the window to be written.

        Looks in the passes that hold prompt (one, or a few chunks) and costs one synchronisation in each.

        Args:
            count: tokens in the window.
            active: [b, 1, 1] bool, the rows that are written; None for all.

        Raises:
            ScopeError: a row's prompt has fewer real tokens than `count`.
        """
        past, end = self._pass.past, self._pass.boundary or 1
        if self._pass.decode or torch.compiler.is_compiling() or not isinstance(past, int) or past >= end:
            return
        lengths = self.prompt_length
        shortest = int((lengths if active is None else lengths.masked_fill(~active[..., 0], count)).min())
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
            return _both(written_by_role(facts, scope), facts.real)
        if facts.decode and self._lengths is None and not scope.count and not scope.start:
            return scope.kind in ANSWER
        end = self._end()
        if end is None and scope.needs_prompt_end:
            raise ScopeError(
                f"scope '{scope}': this forward pass cannot tell where the prompt ends (only `generate` can); pass "
                f"prompt_lengths= (real prompt tokens of each row) to steer(){scope.instead(', or ', 'all', 'first')}"
            )
        if end is None:
            return _mask_or_all(facts.real)
        # A window lies in the prompt; where in it is the method's business.
        return self._choose_side("prompt" if scope.is_window else scope.kind, end)

    def _choose_first(self, count: int) -> Tensor | bool:
        """The first tokens of each row that are not pads."""
        facts = self._pass
        if facts.first is None and isinstance(facts.past, int):
            if facts.past >= count:
                return False
            if facts.past + facts.width <= count:
                return _mask_or_all(facts.real)
        return _both(facts.position < count, facts.real)

    def _choose_side(self, kind: str, end: int | Tensor) -> Tensor | bool:
        """The tokens before the prompt's end, or those from it on, inside of the scope's window."""
        facts = self._pass
        begin = end - 1 if kind == "response" else end
        start, stop = begin + self.scope.start, begin + self.scope.count if self.scope.count else None
        if isinstance(start, int) and isinstance(facts.past, int):
            last = facts.past + facts.width
            if isinstance(stop, int) and facts.past >= stop:
                return False
            before, after = last <= start, facts.past >= start and (not isinstance(stop, int) or last <= stop)
            if before or after:
                return _mask_or_all(facts.real) if after == (kind != "prompt") else False
        late = facts.columns[None, :] >= start
        side = ~late if kind == "prompt" else late if stop is None else late & (facts.columns[None, :] < stop)
        return _both(side.expand(facts.batch, -1), facts.real)

    def _end(self) -> int | Tensor | None:
        """First column after the prompt: one number, [b, 1] of them, or None where nobody knows."""
        facts = self._pass
        if self._lengths is None and facts.ends is not None:
            return facts.ends
        if self._lengths is None:
            return facts.call.edge if facts.boundary is None and facts.call is not None else facts.boundary
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
