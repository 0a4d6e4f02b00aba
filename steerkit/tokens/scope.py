"""`Scope`: the named choices of which tokens are written; `PromptLengths`: where prompts end, when the caller says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerkit.errors import ScopeError, near_miss
from steerkit.prompts.chat_roles import Roles
from steerkit.prompts.marks import Marks

if TYPE_CHECKING:
    from steerkit.tokens.forward_pass import Pass

__all__ = ["PromptLengths", "Scope"]

SCOPES = (
    "all",
    "prompt",
    "response",
    "response(n)",
    "response(a:b)",
    "generated",
    "generated(n)",
    "generated(a:b)",
    "first(n)",
    "assistant",
    "answer",
    "after(n)",
    "front",
    "mid",
    "back",
)
ROLES = ("assistant", "answer", "after")
WINDOWS = ("front", "mid", "back")
COUNTED = ("first", "after")
ANSWER = ("response", "generated")
_COUNTED = re.compile(r"(first|after|response|generated)\(([0-9]+)\)")
_FROM_TO = re.compile(r"(response|generated)\(([0-9]*):([0-9]*)\)")
_MOST_DIGITS = 9  # far more tokens than any text has, and no number that a tensor of positions could not hold


@dataclass(frozen=True)
class Scope:
    """Which tokens are written.

    `all`; `prompt` (up to and with the last prompt token); `response` (from the last prompt token on: every position
    whose output is a generated token); `generated` (one later); `response(n)` and `generated(n)` (the first n positions
    of these: `response(5)` steers the choice of the first five generated tokens and of no later one); `response(a:b)`
    and `generated(a:b)` (from position a on, up to and without position b; either may be left out); `first(n)`
    (counted from each row's first real token); `front`, `mid` and `back` (a window of the prompt as long as the vector,
    for methods that store one row per position). Pads are never written.

    By role, where the tokenizer's chat template tells: `assistant` (all assistant messages, in the history too),
    `answer` (the same without thinking), `after(n)` (all behind message n, counted from 0 as the template renders
    them). Like `response`, each begins at the position whose output is its first token: see
    `steerkit.prompts.marks`.

    Attributes:
        kind: the name.
        count: n of `first(n)` and `after(n)`; of `response` and `generated` where they end, 0 standing for no end.
        start: of `response` and `generated`: positions at their beginning that are left out.
        marks: of scopes by role, the marks of the tokenizer's template; no part of the scope's text.
        others: the kinds that whoever writes could use as well, for advice; no part of the scope's text.
    """

    kind: str
    count: int = 0
    start: int = field(default=0, kw_only=True)
    marks: Marks | None = field(default=None, compare=False, repr=False)
    others: tuple[str, ...] = field(default=("all", "first"), compare=False, repr=False)

    @classmethod
    def parse(cls, text: str | Scope) -> Scope:
        """Read a scope from its text form.

        Args:
            text: ``"all"``, ``"response"``, ``"first(4)"``, ...

        Raises:
            ScopeError: the text names no scope, counts less than one token, or ends before it begins.
        """
        if isinstance(text, Scope):
            return text
        name = text.replace(" ", "")
        counted, window = _COUNTED.fullmatch(name), _FROM_TO.fullmatch(name)
        if counted:
            (count,) = _numbers(text, counted[2])
            if counted[1] != "after" and count < 1:
                raise ScopeError(f"scope {text!r}: {counted[1]}(n) needs n of at least 1")
            return cls(counted[1], count)
        if window:
            start, end = _numbers(text, window[2] or "0", window[3] or "0")
            return cls.window(window[1], start, end if window[3] else None)
        if name not in SCOPES or "(" in name:
            raise ScopeError(f"unknown scope {text!r}; {near_miss(name, SCOPES)}")
        return cls(name)

    @property
    def leaves_prompts(self) -> bool:
        """Whether nothing is written before the last token of a prompt, whatever the tokens are."""
        return self.kind in ANSWER

    @classmethod
    def window(cls, kind: str, start: int, end: int | None) -> Scope:
        """A stretch of the answer.

        Args:
            kind: `response` or `generated`.
            start: its first position, counted from 0.
            end: the position behind its last one; None has no end.

        Raises:
            ScopeError: it ends before it begins.
        """
        if end is not None and end <= start:
            raise ScopeError(f"scope '{kind}({start}:{end})' ends before it begins; give an end above {start}, or none")
        return cls(kind, end or 0, start=start)

    def __str__(self) -> str:
        if self.start:
            return f"{self.kind}({self.start}:{self.count or ''})"
        return f"{self.kind}({self.count})" if self.kind in COUNTED or self.count else self.kind

    @property
    def is_window(self) -> bool:
        """Whether this scope is a window of the prompt, as long as the vector."""
        return self.kind in WINDOWS

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
        return replace(self, marks=roles.check(self.kind))

    def among(self, kinds: Sequence[str]) -> Scope:
        """The same scope, which then advises no other than these.

        Args:
            kinds: that the method allows.
        """
        return replace(self, others=tuple(kinds))

    def instead(self, before: str, *kinds: str) -> str:
        """Advice to end an error message with: those of some kinds that are allowed here.

        Args:
            before: what parts it from the message.
            kinds: that would do.

        Returns:
            Half a sentence; empty where none is allowed.
        """
        texts = [f"'{kind}(n)'" if kind in COUNTED else f"'{kind}'" for kind in kinds if kind in self.others]
        return f"{before}use scope={' or '.join(texts)}" if texts else ""

    def settled(self, prompt: int, length: int) -> int:
        """How much of a text this scope writes in the same way where it is the beginning of a longer prompt.

        Which tokens `all`, `first(n)` and scopes by role mean follows from what stands before them, so that is all of
        it. Those that count from the prompt's end mean other tokens as soon as the prompt goes on.

        Args:
            prompt: real tokens of its prompt.
            length: real tokens of it in all.

        Returns:
            So many tokens from its first one on.
        """
        if self.kind in ("all", "first", *ROLES):
            return length
        return {"prompt": prompt, "response": prompt - 1, "generated": prompt}.get(self.kind, 0)

    @property
    def needs_prompt_end(self) -> bool:
        """Whether this scope means nothing until it is known where the prompt ends."""
        return self.kind in ("prompt", "response", "generated", "mid", "back")


def _numbers(text: str, *digits: str) -> list[int]:
    """The numbers of a scope's text.

    Raises:
        ScopeError: one is longer than any text.
    """
    longest = max(digits, key=len)
    if len(longest) > _MOST_DIGITS:
        raise ScopeError(f"scope {text[:20]!r}...: counts at most {_MOST_DIGITS} digits of tokens, got {len(longest)}")
    return [int(one) for one in digits]


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

    def place(self, device: torch.device) -> None:
        """Put them on a device, once: compiled code that makes them there is compiled again when they are there.

        Args:
            device: of the passes to come.
        """
        if device not in self._tensors:
            self._tensors[device] = torch.tensor(self.values, dtype=torch.long, device=device)

    def on(self, facts: Pass) -> Tensor:
        """The lengths as a tensor [b], one per row of a pass.

        Args:
            facts: the pass.

        Raises:
            ScopeError: the rows of the pass do not fit the lengths given.
        """
        self.place(facts.device)
        values = self._tensors[facts.device]
        return values.expand(facts.batch) if len(values) == 1 else facts.expand(values, "prompt_lengths")
