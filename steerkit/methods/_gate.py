"""What gates share: the prompt is read once, at its end, and that decides for each row how strongly it is written.

Everything is kept per row, in the state of one text, and computed in float32. A row whose gate is closed comes back
bitwise (in models of routed experts, which mix the rows of a batch, beside open rows from the second step on only up to
rounding). The one look at the values (which costs an accelerator a stop) is taken when the prompt has been read;
decoding steps take none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import ModelError, ScopeError, VectorMismatchError
from steerkit.methods._protocols import Prepared
from steerkit.network.sites import Site
from steerkit.tokens.forward_pass import Tokens

__all__ = ["READOUTS", "Decision", "Gate"]

READOUTS = ("last", "mean")


@dataclass(frozen=True)
class Decision:
    """What a gate found for the rows of a batch.

    Attributes:
        is_open: [b] bool, which rows are written at all.
        gains: per written site [b] float32, how strongly; a missing site counts 1.
    """

    is_open: Tensor
    gains: Mapping[Site, Tensor] = field(default_factory=dict)


@dataclass
class _State:
    """What a gate remembers of one text."""

    rows: int
    found: dict[Site, Tensor] = field(default_factory=dict)
    sums: dict[Site, tuple[Tensor, Tensor]] = field(default_factory=dict)
    seen: dict[Site, int] = field(default_factory=dict)
    decision: Decision | None = None
    opened: int | None = None
    """How many rows are open by the prompt; None behind a later decision, at which nobody looks."""
    later: tuple[Any, Decision] | None = None
    """What was decided behind a generated token, and the column from which on it does not count yet."""
    shifts: dict[Site, tuple[Tensor, int, Tensor]] = field(default_factory=dict)


class Gate(ABC):
    """An editor that pools what it reads into one row per text, decides, and adds a direction where it is open.

    Args:
        reads: where it reads.
        readout: ``"last"`` (the last real prompt token) or ``"mean"`` (all of them but the first).
        limit: gains times strength go no further than this; None for no limit.
        follows: decide again at every decoding step, for the step after it.
    """

    def __init__(
        self, reads: tuple[Site, ...], readout: str | None, *, limit: float | None = None, follows: bool = False
    ) -> None:
        if readout not in READOUTS:
            raise VectorMismatchError(
                f"a gate reads {' or '.join(READOUTS)} of the prompt, the vector says {readout!r}; fit it so"
            )
        self._reads, self._readout, self._limit, self._follows = reads, readout, limit, follows

    @property
    def reads(self) -> tuple[Site, ...]:
        """Where it reads."""
        return self._reads

    @property
    def readout(self) -> str | None:
        """Which prompt tokens it reads: ``"last"`` or ``"mean"``."""
        return self._readout

    @property
    def limit(self) -> float | None:
        """How far gains times strength go at most; None for no limit."""
        return self._limit

    @property
    def follows(self) -> bool:
        """Whether it decides again behind every generated token."""
        return self._follows

    @abstractmethod
    def opening(self, found: Mapping[Site, Tensor]) -> Tensor:
        """By what it decides, as one number per row: the gate opens where that is large enough.

        Args:
            found: per read site [b, d] float32.

        Returns:
            [b] float64.

        Raises:
            FitError: the gate does not decide by one number.
        """

    @abstractmethod
    def decide(self, found: Mapping[Site, Tensor]) -> Decision:
        """Decide about the rows of a batch, each for itself.

        Args:
            found: per read site [b, d] float32.
        """

    def begin(self, rows: int, device: torch.device) -> _State:
        """A new state, undecided.

        Args:
            rows: of the text.
            device: unused; the tensors say it themselves.
        """
        return _State(rows)

    def decides(self, tokens: Tokens, state: _State) -> bool:
        """Whether a pass holds the prompt's end and nothing has been decided yet.

        Args:
            tokens: of the pass.
            state: of the text.
        """
        return state.decision is None and tokens.last_prompt() is not None

    def read(self, site: Site, h: Tensor, tokens: Tokens, state: _State) -> None:
        """Pool what this pass holds of the prompt; with the last of it, decide.

        Args:
            site: where it is read.
            h: [b, t, d].
            tokens: of the pass.
            state: of the text.

        Raises:
            ModelError: activations are not finite.
            ScopeError: a row has no token, or each token is to be followed and this pass holds several.
        """
        if state.decision is not None:
            if self._follows:
                self._follow(site, h, tokens, state)
            return
        index = tokens.last_prompt()
        if self._readout == "mean":
            self._add(site, h, tokens, state)
        if index is None:
            return
        if self._readout == "last":
            state.found[site] = h[torch.arange(len(h), device=h.device), index.to(h.device).clamp_min(0)].float()
        else:
            total, count = state.sums.pop(site)
            state.found[site] = total / count.clamp_min(1.0)
            index = torch.where(count[:, 0].to(index.device) > 0, index, -1)
        if len(state.found) == len(self._reads):
            self._settle(state, index)

    def _add(self, site: Site, h: Tensor, tokens: Tokens, state: _State) -> None:
        """Add the prompt tokens of a pass to the running sum of a site, each column once."""
        past, width = tokens.columns
        if site not in state.seen and (past if isinstance(past, int) else int(past)) > 0:
            raise ScopeError(
                "a gate over the whole prompt, and part of the prompt was cached before; give it without that cache"
            )
        seen = state.seen.get(site, 0)
        end = (past if isinstance(past, int) else int(past)) + width
        state.seen[site] = max(seen, end)
        counted = tokens.in_prompt(seen).to(h.device, torch.float32)
        with torch.autocast(h.device.type, enabled=False):  # in half precision the sum would be coarse, or infinite
            total = torch.bmm(counted[:, None, :], h.float())[:, 0]
        count = counted.sum(dim=1, keepdim=True)
        if site in state.sums:
            total, count = total + state.sums[site][0], count + state.sums[site][1]
        state.sums[site] = (total, count)

    def _settle(self, state: _State, index: Tensor) -> None:
        """Decide, and look once at what came out."""
        device = state.found[self._reads[-1]].device
        found = {site: rows.to(device) for site, rows in state.found.items()}
        decision = self.decide(found)
        wrong = torch.stack([(~torch.isfinite(rows)).any() for rows in found.values()]).any()
        counts = [decision.is_open.sum(), wrong.long(), (index < 0).sum().to(device)]
        opened, infinite, empty = torch.stack([count.to(device) for count in counts]).tolist()
        if empty:
            what = "last token" if self._readout == "last" else "tokens behind the first"
            raise ScopeError(f"a gate reads the prompt's {what}, and {empty} rows of this batch have none")
        if infinite:
            raise ModelError("a gate read activations that are not finite; load the model in float32 or bfloat16")
        state.decision, state.opened = decision, int(opened)
        state.found.clear()

    def _follow(self, site: Site, h: Tensor, tokens: Tokens, state: _State) -> None:
        """Decide anew behind each generated token, for the next one."""
        if tokens.moves_rows:
            raise ScopeError("a gate that follows each token cannot follow beams; generate with num_beams=1")
        if not tokens.is_decoding:
            if tokens.goes_on:
                raise ScopeError("a gate that follows each token takes one a pass; generate with a cache, unassisted")
            return
        self._take_over(tokens, state)
        state.found[site] = h[:, -1].float()
        if len(state.found) == len(self._reads):
            found = {one: rows.to(h.device) for one, rows in state.found.items()}
            state.later = (tokens.columns[0], self.decide(found))
            state.found.clear()

    @staticmethod
    def _take_over(tokens: Tokens, state: _State) -> None:
        """Let what an earlier step decided count from this one on."""
        if state.later is not None and state.later[0] != tokens.columns[0]:
            state.decision, state.later, state.opened = state.later[1], None, None
            state.shifts.clear()

    def write(self, site: Site, h: Tensor, prepared: Prepared, tokens: Tokens, state: _State) -> Tensor:
        """Add the direction to open rows, as strongly as their gain says.

        Args:
            site: where it is written.
            h: [b, t, d].
            prepared: ``direction`` and ``strength``, float32.
            tokens: of the pass.
            state: of the text.

        Returns:
            [b, t, d]; `h` itself where no row is open.

        Raises:
            ScopeError: this pass would be written before the prompt's end has come.
        """
        self._take_over(tokens, state)
        decision = state.decision
        if decision is None and tokens.is_decoding:
            raise ScopeError(
                "nothing was decided when the prompt was read, because the strength was neutral; begin with another one"
            )
        if decision is None:
            raise ScopeError(
                f"scope '{tokens.scope}': prompt tokens would be written before the gate has read the prompt's end "
                "(chunked prefill); use scope='response', or the prompt in one pass"
            )
        if state.opened == 0:
            return h
        edited = self._edited(site, h, prepared, tokens, decision, state)
        if state.opened == state.rows:
            return edited
        return torch.where(decision.is_open.to(h.device)[:, None, None], edited, h)

    def _edited(
        self, site: Site, h: Tensor, prepared: Prepared, tokens: Tokens, decision: Decision, state: _State
    ) -> Tensor:
        """The activations [b, t, d] as open rows get them."""
        return h + self._shift(site, h, prepared, decision, state)

    def _shift(self, site: Site, h: Tensor, prepared: Prepared, decision: Decision, state: _State) -> Tensor:
        """[b, 1, d] what is added; made once per text, and again when the strength changes."""
        strength, direction = prepared["strength"], prepared["direction"]
        known = state.shifts.get(site)
        if known is not None and known[0] is strength and known[1] == strength._version:
            return known[2]
        gain = decision.gains.get(site)
        by = strength if gain is None else strength * gain.to(h.device)[:, None, None]
        if self._limit is not None:
            by = by.clamp(-self._limit, self._limit)
        shift = (by * direction).to(h.dtype)
        state.shifts[site] = (strength, strength._version, shift)
        return shift

    def finish(self, state: _State) -> Tensor | bool:
        """The rows whose gate has opened.

        Args:
            state: of the text.
        """
        if state.decision is None or state.opened == 0:
            return False
        return True if state.opened == state.rows else state.decision.is_open

    @abstractmethod
    def explain(self, found: Mapping[Site, Tensor], strength: float) -> list[dict[str, Any]]:
        """What it would decide, per row.

        Args:
            found: per read site [b, d] float32.
            strength: at which it would steer.
        """
