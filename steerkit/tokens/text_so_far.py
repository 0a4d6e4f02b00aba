"""Which tokens of a pass a scope by role means: told from the ids of the whole text, read on from pass to pass.

A chat's turns are told from the ids up to a token (see `steerkit.prompts.marks`), but a pass that goes on from a cache
carries only what is new. What the earlier passes came to is kept with the text, so that a decoding step costs the same
however long the text is. Where a pass does not go on where the last one ended (rejected candidates, a cache that was
cut) or rows may have moved (beams), the whole text is read again: inside `generate` it is a local variable of the frame
that decodes; in the caller's own loop the ids of earlier passes are kept with the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from steerkit.errors import ScopeError
from steerkit.prompts.marks import ReadSoFar
from steerkit.tokens.transformers_facts import is_static

if TYPE_CHECKING:
    from steerkit.tokens.forward_pass import Pass
    from steerkit.tokens.scope import Scope

__all__ = ["written_by_role"]

_IDS = "ids"  # where the ids of a text are kept among what goes with its cache


class _Kept(NamedTuple):
    """What is kept of a text for one scope: how far it was read, whether behind its prompt too, what it came to."""

    rows: int
    columns: int
    is_told: bool
    so_far: ReadSoFar


def written_by_role(facts: Pass, scope: Scope) -> Tensor:
    """Which tokens of a pass a scope by role means.

    Args:
        facts: the pass.
        scope: with its marks.

    Returns:
        [b, t] bool, pads not yet left out.

    Raises:
        ScopeError: the ids of the text so far are not known.
    """
    marks, given, past = scope.marks, facts.given, facts.past
    assert marks is not None
    if given is None:
        raise ScopeError(f"scope '{scope}': this pass has no token ids (inputs_embeds); give input_ids")
    if not isinstance(past, int):
        ids, column = _text_of_compiled(facts, given, past, scope)
        return marks.written(scope.kind, scope.count, ids).index_select(1, column)
    own = None if facts.call is not None else _own_text(facts, given, past)
    key = (scope, id(marks))
    kept: _Kept | None = facts.store.get(key)
    if kept is not None and (kept.rows, kept.columns) == (facts.batch, past) and _goes_on(facts, kept):
        here, so_far = marks.read_on(scope.kind, scope.count, given, kept.so_far)
    else:
        ids = own.whole(facts, scope) if own is not None else _text_of_call(facts, given, scope)
        written, so_far = marks.read_on(scope.kind, scope.count, ids)
        here = written[:, past:]
    facts.store[key] = _Kept(facts.batch, past + facts.width, past > 0, so_far)
    return here


def _goes_on(facts: Pass, kept: _Kept) -> bool:
    """Whether a pass that begins where the last one ended is of the same rows.

    A call of `generate` is asked once whether the ids behind its prompt can be had: where they cannot, nobody knows
    what becomes of its rows. Beams move them.
    """
    if facts.call is None:
        return True
    settings = facts.call.settings
    return kept.is_told and facts.decode and settings is not None and (getattr(settings, "num_beams", None) or 1) == 1


def _text_of_compiled(facts: Pass, given: Tensor, past: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
    """Ids [b, max_length] of a static cache's text, and the one column of this pass."""
    if facts.call is None or facts.call.text is None or facts.width > 1:
        raise ScopeError(
            f"scope '{scope}': compiled code and static caches outside of generate do not tell the text so "
            "far; use a dynamic cache, or pass disable_compile=True to generate()"
        )
    column = past.reshape(1)
    return facts.call.text.index_copy_(1, column, given), column


class _OwnText:
    """The ids of a text in the caller's own loop, pass by pass."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._columns = 0

    def go_on(self, given: Tensor, past: int) -> None:
        """Add the ids [b, t] of a pass behind some column."""
        if past < self._columns:
            self._parts = [torch.cat(self._parts, dim=1)[:, :past]] if past else []
            self._columns = past
        if self._parts and len(self._parts[-1]) != len(given):
            self._parts, self._columns = [], 0
        self._parts.append(given.clone())
        self._columns += given.shape[1]

    def whole(self, facts: Pass, scope: Scope) -> Tensor:
        """The text [b, past + t] of the pass that was added last."""
        assert isinstance(facts.past, int)
        if self._columns != facts.past + facts.width:
            raise ScopeError(
                f"scope '{scope}': the cache of this pass was not filled under it, so the text so far is not "
                "known; run the whole text inside steer()"
            )
        self._parts = [torch.cat(self._parts, dim=1)]
        return self._parts[0]


def _own_text(facts: Pass, given: Tensor, past: int) -> _OwnText:
    """The text of a pass in the caller's own loop, which goes on once in a pass however many scopes ask."""
    own: _OwnText | None = facts.store.get(_IDS)
    if own is None:
        own = facts.store[_IDS] = _OwnText()
        held = None if facts.decoding is None else facts.decoding.ids_on(facts.device)
        if held is not None:
            own.go_on(held, 0)
    if not facts.is_kept:
        facts.is_kept = True
        own.go_on(given, past)
    return own


def _text_of_call(facts: Pass, given: Tensor, scope: Scope) -> Tensor:
    """The text [b, past + t] of a pass inside `generate`."""
    past, call = facts.past, facts.call
    assert isinstance(past, int) and call is not None
    whole: Tensor | None = given
    if past > 0:
        whole = None if call.starts_late or call.running is None else call.running()
    if whole is None or whole.shape[0] != facts.batch or whole.shape[1] < past + facts.width:
        raise ScopeError(
            f"scope '{scope}': this generate call does not tell the ids of the text so far; give it the whole "
            "text and not only what is new, and one of transformers' own ways to decode"
        )
    whole = whole[:, : past + facts.width].to(facts.device)
    if not facts.decode and is_static(facts.cache):
        call.keep_text(whole)
    return whole
