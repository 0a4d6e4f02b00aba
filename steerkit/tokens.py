"""Which tokens a forward pass holds, and which of them a scope means.

This is the only file that knows about positions. A `PassClock` hooks the outermost transformers model (and its decoder
body, for people who call that one alone) and notes, before every forward pass, which columns of the sequence the pass
carries, which of them are real tokens, and where the prompt ends. A `Scope` is then a question to that `Pass`.

Columns count from the left edge of the padded sequence; positions count from each row's first real token. Where the
prompt ends is certain inside `generate`: the expanded prompt is a local variable of the outermost `generate` frame, in
every mode (beams, chunked prefill, assisted decoding, `use_cache=False`, ...). In any other forward pass nobody can
know, so scopes that depend on it need `prompt_lengths`.

Scopes by role (`assistant`, `answer`, `after(n)`) need the ids of the whole text so far, in every pass. Inside
`generate` they are a local variable of the frame that decodes, whichever rows beams and rejected candidates have moved;
elsewhere they are in the pass itself, or kept with its cache.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.errors import ModelError, ScopeError, near_miss
from steerkit.roles import Marks, Roles

__all__ = ["Hook", "Pass", "PassClock", "PromptLengths", "Scope", "Tokens"]

SCOPES = (
    "all",
    "prompt",
    "response",
    "generated",
    "first(n)",
    "assistant",
    "answer",
    "after(n)",
    "front",
    "mid",
    "back",
)
PACKED = "several texts share a row of this pass (packed, or batched continuously), so their ends are not known"
ROLES = ("assistant", "answer", "after")
_COUNTED = re.compile(r"(first|after)\((\d+)\)")
# What the frame that decodes calls the ids of the whole text: with candidates, of beams, else.
_IDS = "ids"  # where the ids of a text are kept among what goes with its cache
_RUNNING = ("candidate_input_ids", "flat_running_sequences", "input_ids")


@dataclass(frozen=True)
class Scope:
    """Which tokens are written.

    `all`; `prompt` (up to and with the last prompt token); `response` (from the last prompt token on: every position
    whose output is a generated token); `generated` (one later); `first(n)` (counted from each row's first real token);
    `front`, `mid` and `back` (a window of the prompt as long as the vector, for methods that store one row per
    position). Pads are never written.

    By role, where the tokenizer's chat template tells: `assistant` (all assistant messages, in the history too),
    `answer` (the same without thinking), `after(n)` (all behind message n, counted from 0 as the template renders
    them). Like `response`, each begins at the position whose output is its first token: see `steerkit.roles`.

    Attributes:
        kind: the name.
        count: n of `first(n)` and `after(n)`.
        marks: of scopes by role, the marks of the tokenizer's template; no part of the scope's text.
    """

    kind: str
    count: int = 0
    marks: Marks | None = field(default=None, compare=False, repr=False)

    @classmethod
    def parse(cls, text: str | Scope) -> Scope:
        """Read a scope from its text form.

        Args:
            text: ``"all"``, ``"response"``, ``"first(4)"``, ...

        Raises:
            ScopeError: the text names no scope, or `first` counts less than one token.
        """
        if isinstance(text, Scope):
            return text
        name = text.replace(" ", "")
        counted = _COUNTED.fullmatch(name)
        if counted:
            if counted[1] == "first" and int(counted[2]) < 1:
                raise ScopeError(f"scope {text!r}: first(n) needs n of at least 1")
            return cls(counted[1], int(counted[2]))
        if name not in SCOPES or name.endswith("(n)"):
            raise ScopeError(f"unknown scope {text!r}; {near_miss(name, SCOPES)}")
        return cls(name)

    def __str__(self) -> str:
        return f"{self.kind}({self.count})" if self.kind in ("first", "after") else self.kind

    @property
    def is_by_role(self) -> bool:
        """Whether this scope needs a chat template's marks."""
        return self.kind in ROLES

    def marked(self, roles: Roles | None) -> Scope:
        """The scope with the marks it needs; other scopes come back as they are.

        Args:
            roles: of the model's tokenizer, where it was given.

        Raises:
            ScopeError: the scope needs marks and there is no tokenizer, or its template has none that ids can tell.
        """
        if not self.is_by_role:
            return self
        if roles is None:
            raise ScopeError(f"scope '{self}': its marks are the chat template's; pass tokenizer= to steer()")
        return Scope(self.kind, self.count, roles.check(self.kind))

    @property
    def needs_prompt_end(self) -> bool:
        """Whether this scope means nothing until it is known where the prompt ends."""
        return self.kind in ("prompt", "response", "generated", "mid", "back")


class PromptLengths:
    """Real prompt tokens of each row, given by the caller for passes that cannot tell.

    Args:
        lengths: one number per row of the batch (without pads), or one for all rows.

    Raises:
        ScopeError: a length is not a whole number of at least 1, or there is none.
    """

    def __init__(self, lengths: Sequence[int] | Tensor | int) -> None:
        listed: Any = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        values = list(listed) if isinstance(listed, Sequence) and not isinstance(listed, str) else [listed]
        wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, int) or value < 1]
        if not values or wrong:
            got = repr(wrong[0]) if wrong else "none"
            raise ScopeError(f"prompt_lengths: got {got}; give the number of real prompt tokens (>= 1) of every row")
        self.values = tuple(values)
        self._tensors: dict[torch.device, Tensor] = {}

    def on(self, facts: Pass) -> Tensor:
        """The lengths as a tensor [b], one per row of a pass.

        Args:
            facts: the pass.

        Raises:
            ScopeError: the rows of the pass do not fit the lengths given.
        """
        if facts.device not in self._tensors:
            self._tensors[facts.device] = torch.tensor(self.values, dtype=torch.long, device=facts.device)
        values = self._tensors[facts.device]
        return values.expand(facts.batch) if len(values) == 1 else facts.expand(values, "prompt_lengths")


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
        bare: nothing is to be written in this pass.
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
        bare: bool = False,
        position_ids: Tensor | None = None,
        store: dict[Any, Any] | None = None,
        held: tuple[Any, ...] = (),
        is_probe: bool = False,
        is_apart: bool = False,
        given: Tensor | None = None,
        call: _Call | None = None,
        cache: Any = None,
    ) -> None:
        self.batch, self.width, self.past, self.device = batch, width, past, device
        self.boundary, self.decode, self.expands = boundary, decode, expands
        self.rows, self.only_all, self.bare = rows, only_all, bare
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

    def _text_of_call(self, call: _Call, given: Tensor, past: int, scope: Scope) -> Tensor:
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


class Hook:
    """Base of every hook on a model: a copy of it does nothing, so a deep copy of a steered model is not steered."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> Any:
        return _inert

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_hook, ()


def _inert(*_args: Any, **_kwargs: Any) -> None:
    """What a copy of a hook does."""


def _inert_hook() -> Any:
    """What a pickled hook comes back as."""
    return _inert


class PassClock:
    """Two hooks on a model that note the facts of every forward pass, per thread.

    Args:
        model: the transformers model itself (not a wrapper around it).
        body: its decoder body, which people also call alone; the outer model's facts win.
    """

    def __init__(self, model: nn.Module, body: nn.Module) -> None:
        # Weak: a hook must not keep a model alive.
        self._model, self._body = weakref.ref(model), weakref.ref(body)
        self._local = threading.local()
        self._handles: list[Any] = []
        self._names = {id(module): tuple(inspect.signature(module.forward).parameters) for module in (model, body)}
        self._generate_code, self._decoding_codes = _generate_code(), _decoding_codes()
        self.owner = threading.get_ident()
        self.users = 0

    @staticmethod
    def of(model: nn.Module) -> PassClock | None:
        """The clock that already hangs on a transformers model, if any."""
        for hook in model._forward_pre_hooks.values():
            holder = getattr(hook, "clock", None)
            if isinstance(holder, PassClock):
                return holder
        return None

    def attach(self) -> None:
        """Hang the hooks on the model; the first attachment of several does it."""
        self.users += 1
        if self.users > 1:
            return
        model, body = self._model(), self._body()
        try:
            for module in {id(model): model, id(body): body}.values():
                if module is not None:
                    before, after = _Before(self), _After(self)
                    self._handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
                    self._handles.append(module.register_forward_hook(after, always_call=True))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take the hooks off when their last user goes."""
        self.users -= 1
        if self.users <= 0:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    @property
    def now(self) -> Pass | None:
        """The pass this thread is in; None outside of one."""
        live: _Live | None = getattr(self._local, "live", None)
        return None if live is None else live.facts

    @contextlib.contextmanager
    def items(self, rows: tuple[int, ...]) -> Iterator[None]:
        """Say which items the rows of this thread's next passes are, for values given one per item.

        Args:
            rows: one item index per row.
        """
        self._local.rows = rows
        try:
            yield
        finally:
            self._local.rows = None

    @property
    def settings(self) -> Any:
        """The settings of the `generate` call of this model that this thread is in; None outside of one."""
        return self._prompt()[1]

    @property
    def is_suspended(self) -> bool:
        """Whether this thread has switched the edits off."""
        return getattr(self._local, "suspended", False)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Run forward passes of this thread without any edit, for probes and recordings of the bare model."""
        before = self.is_suspended
        self._local.suspended = True
        try:
            yield
        finally:
            self._local.suspended = before

    @contextlib.contextmanager
    def aside(self, facts: Pass, held: tuple[Any, ...]) -> Iterator[None]:
        """Run passes of this thread beside the one that is about to run: they share its store and move nothing on.

        Args:
            facts: the pass about to run.
            held: whose writes wait meanwhile.
        """
        live = getattr(self._local, "live", None)
        call: _Call | None = getattr(self._local, "call", None)
        columns = 0 if call is None else call.columns
        self._local.aside = {"store": facts.store, "held": held, "is_probe": True}
        if call is not None and isinstance(facts.past, int):
            call.columns = facts.past
        try:
            yield
        finally:
            self._local.aside = None
            self._local.live = live  # the probe may have been stopped half-way, without its closing hooks
            if call is not None:
                call.columns = columns

    @contextlib.contextmanager
    def again(self, facts: Pass, columns: int) -> Iterator[None]:
        """Run the end of a pass once more, on a cache that has been cut back.

        Args:
            facts: the pass.
            columns: how many the cache holds.
        """
        call: _Call | None = getattr(self._local, "call", None)
        if call is not None:
            call.columns = columns
        self._local.aside = {"store": facts.store}
        try:
            yield
        finally:
            self._local.aside = None

    def arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a pass by name.

        Args:
            module: the model or its decoder body.
            args: positional ones.
            kwargs: named ones.
        """
        return dict(zip(self._names.get(id(module), ()), args, strict=False)) | dict(kwargs)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the facts of a pass that is about to run.

        Raises:
            ModelError: the model itself gets this mode wrong (a Mamba cache continued by a second `generate`).
        """
        live = self._live()
        given = self.arguments(module, args, kwargs)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        facts: Pass | None = None
        if isinstance(tokens, Tensor) and tokens.dim() >= 2:
            if live is not None and module is not live.module and module is self._body():
                facts = live.facts  # the body inside its model: the outer facts win (it saw the 2-D mask)
                if facts is not None and (facts.batch, facts.width) != (tokens.shape[0], tokens.shape[1]):
                    facts = None
            facts = self._read(tokens, given) if facts is None else facts
        frame = None if torch.compiler.is_compiling() else sys._getframe(2)
        self._local.live = _Live(module, facts, frame, live)

    def leave(self, module: nn.Module, output: Any = None) -> None:
        """Forget the facts of the pass that has just run.

        Args:
            module: what ran.
            output: what it gave; what the pass kept goes on with a cache that was made in it.
        """
        live: _Live | None = getattr(self._local, "live", None)
        if live is not None and live.facts is not None and live.facts.store and not torch.compiler.is_compiling():
            self._hand_on(live.facts.store, output)
        while live is not None:
            done, live = live.module is module, live.outer
            if done:
                break
        self._local.live = live

    def _hand_on(self, store: dict[Any, Any], output: Any) -> None:
        """Keep a pass's store with the cache it gave, where no call or cache keeps it yet."""
        cache = getattr(output, "past_key_values", None)
        call: _Call | None = getattr(self._local, "call", None)
        stores: dict[int, _Kept] = getattr(self._local, "stores", {})
        known = (call is not None and call.store is store) or any(kept.store is store for kept in stores.values())
        if cache is not None and not known:
            self._local.stores = {**stores, id(cache): _Kept(weakref.ref(cache), store)}

    def _store_of(self, call: _Call | None, cache: Any, past: int | Tensor) -> dict[Any, Any]:
        """What is kept from pass to pass of the text that this pass belongs to."""
        if call is not None:
            return call.store
        stores: dict[int, _Kept] = getattr(self._local, "stores", {})
        if stores:
            self._local.stores = stores = {key: kept for key, kept in stores.items() if kept.cache() is not None}
        if cache is None or (isinstance(past, int) and past == 0):
            return {}
        return stores[id(cache)].store if id(cache) in stores else {}

    def _live(self) -> _Live | None:
        """The pass this thread is in, without those an interrupt left behind (torch calls no closing hook then)."""
        live: _Live | None = getattr(self._local, "live", None)
        if live is None or torch.compiler.is_compiling():
            return live
        stack: set[int] = set()
        frame: Any = sys._getframe(1)
        while frame is not None:
            stack.add(id(frame))
            frame = frame.f_back
        while live is not None and live.frame is not None and id(live.frame) not in stack:
            live = live.outer
        return live

    # What follows reads one pass. See the table of modes in the tests for what each branch is for.

    def _read(self, tokens: Tensor, given: Mapping[str, Any]) -> Pass:
        batch, width = tokens.shape[0], tokens.shape[1]
        cache = given.get("past_key_values")
        cache = given.get("cache_params") if cache is None else cache
        mask = given.get("attention_mask")
        compiling = torch.compiler.is_compiling()
        prompt, settings = (None, None) if compiling else self._prompt()
        call = self._call_of(prompt, settings, cache, compiling)
        ids = given.get("input_ids")
        past = _past(cache, mask, width, call, compiling)
        facts: dict[str, Any] = {"batch": batch, "width": width, "device": tokens.device}
        facts["rows"] = getattr(self._local, "rows", None)
        facts["bare"] = self.is_suspended
        facts["given"] = ids if isinstance(ids, Tensor) and ids.shape[:2] == (batch, width) else None
        facts["expands"] = compiling or call is not None or cache is not None
        if past is None:
            reason = "a recurrent cache does not say how many tokens it has seen; pass attention_mask over all of them"
            return Pass(**facts, past=0, only_all=reason)
        facts["past"] = past
        if given.get("cu_seq_lens_q") is not None or given.get("block_table") is not None:
            return Pass(**facts, only_all=PACKED)
        keep = given.get("logits_to_keep")
        # `generate` always says how many logits it wants, where the model's forward can be told.
        tells = "logits_to_keep" in self._names.get(id(self._model()), ())
        own_sequence = call is not None and not compiling and keep is None and tells
        facts["is_apart"] = own_sequence
        if call is not None and not compiling and not own_sequence:
            call.note(past, width, keep)
            facts["boundary"] = call.boundary
            facts["decode"] = cache is not None and width == 1 and call.past_prompt(past)
            facts |= {"call": call, "cache": cache}
            call.running = self._running
        elif compiling:
            facts["decode"] = call is not None and cache is not None and width == 1
            facts["call"] = call if facts["decode"] else None
        else:
            facts["boundary"] = self._boundary_of_cache(cache, past, width, keep, given, own_sequence)
        if not compiling:
            facts["store"] = self._store_of(None if own_sequence else call, cache, past)
            facts |= getattr(self._local, "aside", None) or {}
        self._read_pads(facts, mask, cache, call, given)
        return Pass(**facts)

    def _read_pads(
        self, facts: dict[str, Any], mask: Any, cache: Any, call: _Call | None, given: Mapping[str, Any]
    ) -> None:
        if isinstance(mask, Mapping):
            mask, layer = self._mask_of_layers(mask)
        else:
            layer = 0
        if isinstance(mask, Tensor) and mask.dim() == 2:
            facts["attention"] = mask
        elif isinstance(mask, Tensor) and mask.dim() == 4:
            if not facts.get("decode"):
                facts["real"] = _real_of_diagonal(mask, facts["past"], facts["width"], cache, layer, facts["batch"])
            facts["first"] = _first_of_real(facts.get("real"), facts["past"], call)
        elif mask is None and facts["batch"] == 1 and facts["width"] > 1 and call is None:
            facts["position_ids"] = given.get("position_ids")

    def _mask_of_layers(self, masks: Mapping[str, Any]) -> tuple[Any, int]:
        """One mask of a dict by layer type, and a layer that it belongs to; a 2-D one says the most."""
        known = {kind: mask for kind, mask in masks.items() if isinstance(mask, Tensor)}
        model = self._model()
        config: Any = getattr(model, "config", None)
        types = list(getattr(config.get_text_config(), "layer_types", None) or []) if config is not None else []
        ranked = sorted(known, key=lambda kind: (known[kind].dim() != 2, kind != "full_attention"))
        if not ranked:
            return None, 0
        return known[ranked[0]], types.index(ranked[0]) if ranked[0] in types else 0

    def _prompt(self) -> tuple[Tensor | None, Any]:
        """The expanded prompt of the `generate` call of this model that this pass belongs to, and its settings.

        The innermost one on the stack, unless a draft is being made for an outer one: a model that drafts for itself
        calls its own `generate` on prompt and answer so far, whose prompt is the outer one's.
        """
        found, settings, drafts = None, None, False
        frame: Any = sys._getframe(1)
        model = self._model()
        while frame is not None:
            code = frame.f_code
            if code is self._generate_code:
                if (found is None or drafts) and frame.f_locals.get("self") is model:
                    names = frame.f_locals
                    found, settings, drafts = names.get("input_ids"), names.get("generation_config"), False
            elif code.co_name == "get_candidates":
                drafts = True
            frame = frame.f_back
        return (found, settings) if isinstance(found, Tensor) else (None, None)

    def _running(self) -> Tensor | None:
        """The ids of the whole text in the innermost decoding of this model on the stack.

        Innermost, because a model that drafts for itself decodes inside its own decoding.
        """
        frame: Any = sys._getframe(1)
        while frame is not None:
            if frame.f_code in self._decoding_codes and frame.f_locals.get("self") is self._model():
                names = frame.f_locals
                return next((names[name] for name in _RUNNING if isinstance(names.get(name), Tensor)), None)
            frame = frame.f_back
        return None

    def _call_of(self, prompt: Tensor | None, settings: Any, cache: Any, compiling: bool) -> _Call | None:
        """The state of the `generate` call this pass belongs to."""
        last: _Call | None = getattr(self._local, "call", None)
        if compiling:
            return last
        if prompt is None:
            self._local.call = None
            return None
        # One `generate` may run inside another (a logits processor that asks about another text).
        calls: dict[int, _Call] = getattr(self._local, "calls", {})
        for key in [key for key, call in calls.items() if call.prompt() is None]:
            del calls[key]
        self._local.calls = calls
        if id(prompt) not in calls or not calls[id(prompt)].belongs_to(settings):
            if _is_used_recurrent_cache(cache):
                raise ModelError(
                    "generate: this model's recurrent cache was filled by an earlier call, and transformers continues "
                    "such caches wrongly; pass the whole conversation again without past_key_values / cache_params"
                )
            calls[id(prompt)] = _Call(prompt, settings)
        self._local.call = calls[id(prompt)]
        return calls[id(prompt)]

    def _boundary_of_cache(
        self, cache: Any, past: int | Tensor, width: int, keep: Any, given: Mapping[str, Any], own_sequence: bool
    ) -> int | None:
        """Where the prompt ends in a pass without a `generate` frame of its own.

        Either guidance's extra passes for the negative prompt inside `generate` (an own sequence with an own cache),
        or a decoding loop that names `logits_to_keep` as `generate` does. Anything else: unknown.
        """
        if not isinstance(past, int):
            return None
        known: dict[int, tuple[weakref.ref[Any], int]] = getattr(self._local, "caches", {})
        self._local.caches = known
        for key in [key for key, (ref, _) in known.items() if ref() is None]:
            del known[key]
        if cache is not None and id(cache) in known and past > 0:  # an emptied cache begins a new text
            return known[id(cache)][1]
        if own_sequence:
            if cache is None:
                return width if given.get("use_cache") else None
            boundary = past if past > 0 else width
        elif cache is not None and isinstance(keep, int) and keep > 0 and (width > 1 or past == 0):
            boundary = past + width - (keep - 1)
        else:
            return None
        known[id(cache)] = (weakref.ref(cache), boundary)
        return boundary


class _Live(NamedTuple):
    """A pass under way: which module noted it, in which frame, and the pass around it."""

    module: nn.Module
    facts: Pass | None
    frame: Any
    outer: Any


class _Kept(NamedTuple):
    """What is kept with a cache."""

    cache: weakref.ref[Any]
    store: dict[Any, Any]


class _Call:
    """What is remembered of one `generate` call."""

    def __init__(self, prompt: Tensor, settings: Any) -> None:
        self.prompt = weakref.ref(prompt)
        # The prompt may be the caller's own tensor, given again; the settings are copied for each call.
        self._settings = None if settings is None else weakref.ref(settings)
        self.prompt_width = prompt.shape[1]
        self.boundary: int | None = None
        self.first: Tensor | None = None
        self.columns = 0
        self.store: dict[Any, Any] = {}
        self.running: Callable[[], Tensor | None] | None = None
        self.text: Tensor | None = None

    @property
    def settings(self) -> Any:
        """The call's generation settings; None where they are unknown or gone."""
        return None if self._settings is None else self._settings()

    @property
    def starts_late(self) -> bool:
        """Whether the call was given only what is new behind a cache."""
        return self.boundary is not None and self.boundary > self.prompt_width

    def keep_text(self, ids: Tensor) -> None:
        """Keep the ids of a static cache's text where compiled code, which sees no frames, can go on with them."""
        width = max(getattr(self.settings, "max_length", None) or 0, ids.shape[1])
        self.text = ids.new_full((ids.shape[0], width), -1)
        self.text[:, : ids.shape[1]] = ids

    def belongs_to(self, settings: Any) -> bool:
        """Whether a pass with these settings is one of this call."""
        return self._settings is None or self._settings() is settings

    def note(self, past: int | Tensor, width: int, keep: Any) -> None:
        """Fix the boundary at the first pass and count the columns that were cached."""
        start = past if isinstance(past, int) else self.columns
        if self.boundary is None:
            candidates = (keep - 1) if isinstance(keep, int) and keep > 0 else 0
            if self.prompt_width == 0:  # inputs_embeds: the first pass is the prompt
                self.boundary = start + width - candidates
            elif self.prompt_width <= max(start, width - candidates if start else 0):
                self.boundary = start + self.prompt_width
            else:
                self.boundary = self.prompt_width
        self.columns = start + width

    def past_prompt(self, past: int | Tensor) -> bool:
        """Whether a pass that starts at `past` lies behind the prompt."""
        return isinstance(past, int) and self.boundary is not None and past >= self.boundary


class _Before(Hook):
    """The pre-hook of a clock."""

    def __init__(self, clock: PassClock) -> None:
        self.clock = clock

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.clock.enter(module, args, kwargs)

    def suspended(self) -> contextlib.AbstractContextManager[None]:
        """See `PassClock.suspended`."""
        return self.clock.suspended()


class _After(Hook):
    """The closing hook of a clock."""

    def __init__(self, clock: PassClock) -> None:
        self.clock = clock

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> None:
        self.clock.leave(module, output)


def _generate_code() -> Any:
    """The code object of `generate`, whose frame holds the expanded prompt under the name `input_ids`."""
    from transformers.generation.utils import GenerationMixin

    return inspect.unwrap(GenerationMixin.generate).__code__


def _decoding_codes() -> frozenset[Any]:
    """The code objects of the loops that decode, whose frames hold the ids of the whole text."""
    from transformers.generation.utils import GenerationMixin

    loops = (getattr(GenerationMixin, name, None) for name in ("_sample", "_beam_search", "_assisted_decoding"))
    return frozenset(inspect.unwrap(loop).__code__ for loop in loops if loop is not None)


def _past(cache: Any, mask: Any, width: int, call: _Call | None, compiling: bool) -> int | Tensor | None:
    """Columns already cached: a number where the host knows it, else the cache's counter; None where nobody knows."""
    if cache is None:
        return 0
    try:
        length = cache.get_seq_length()
    except ValueError:  # caches without attention layers (Mamba) do not count
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return max(mask.shape[1] - width, 0)
        if call is not None:
            return call.columns
        return None if _is_used_recurrent_cache(cache) else 0
    if isinstance(length, Tensor):
        if compiling or call is None:
            return length.clone()  # block 0 increments the live counter in place
        if call.boundary is not None:
            return call.columns  # no synchronisation in a decoding step
    return int(length)


def _is_used_recurrent_cache(cache: Any) -> bool:
    """Whether a cache has only recurrent layers and has seen tokens."""
    if cache is None:
        return False
    try:
        cache.get_seq_length()
    except ValueError:
        used = getattr(cache, "has_previous_state", False)
        return bool(used() if callable(used) else used)
    return False


def _real_of_diagonal(mask: Tensor, past: int | Tensor, width: int, cache: Any, layer: int, batch: int) -> Tensor:
    """[b, t] real tokens from a 4-D mask: a real token may attend to itself, a pad may not."""
    offset = cache.get_mask_sizes(width, layer)[1] if cache is not None else 0
    keys = (torch.arange(width, device=mask.device) + past - offset).clamp(0, mask.shape[-1] - 1)
    own = mask[:, 0].gather(-1, keys[None, :, None].expand(mask.shape[0], -1, 1))[..., 0]
    real = own if own.dtype == torch.bool else own == 0
    return real.expand(batch, -1)


def _first_of_real(real: Tensor | None, past: int | Tensor, call: _Call | None) -> Tensor | None:
    """[b] first real column, remembered over the chunks of one call where the mask shows only the pass itself."""
    if real is None:
        return call.first if call is not None else None
    leading = real.long().cumsum(dim=1).eq(0).sum(dim=1)  # a row of pads only counts as wide as the pass
    if call is None:
        return leading
    known = call.first
    if known is None:
        call.first = leading
    elif isinstance(past, int) and past > 0:
        call.first = torch.where(known == past, known + leading, known)
    return call.first
