"""The gates of `when`: which rows, or which tokens, a vector is applied to, by readings of any vectors.

Once for a prompt. Its last token is read, at all sites of the vectors that are read, and decides for the whole text, as
the gates of methods do. Where that is read later than is written, the last token is fed again (`replay`).

Per token. Every token is decided by what is read of itself, before it is written: at the last site of each vector that
comes no later than the first block that is written. Such a rule needs no memory, so that it is the same with a cache
and without, under beams, in assisted decoding and in one pass over a whole text. Only what holds a gate open (`off`)
looks at the tokens before, back to the prompt's end. A token that chooses no generated one is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import FitError, ScopeError, VectorMismatchError
from steerkit.methods._base import Method
from steerkit.methods._gate import Decision, Gate
from steerkit.methods._protocols import Editor, Prepared, editor_of
from steerkit.network.sites import Site
from steerkit.steering.readings import SiteReading, VectorReading
from steerkit.steering.replay import is_before
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.steering_vector import SteeringVector
from steerkit.vector.when import Comparison, When

__all__ = ["PromptGate", "TokenGate", "gate_of"]


class PromptGate(Gate):
    """Decides about each prompt by readings of its last token.

    Args:
        when: the rule.
        readings: of the vectors that it names.
        method: what writes the rows that are open.
    """

    def __init__(self, when: When, readings: Mapping[str, VectorReading], method: Method) -> None:
        super().__init__(tuple(dict.fromkeys(site for one in readings.values() for site in one.sites)), "last")
        self._rule, self._comparisons = when.rule, when.comparisons
        self._readings, self._method = readings, method
        for one in readings.values():
            one.scale("prompt_last")  # now, and not in a pass

    def opening(self, found: Mapping[Site, Tensor]) -> Tensor:
        """Refused: a rule over readings has thresholds of its own.

        Args:
            found: unused, per read site [b, d].

        Raises:
            FitError: always.
        """
        raise FitError(f"when({self._rule}): a rule has no one number to be calibrated")

    def decide(self, found: Mapping[Site, Tensor]) -> Decision:
        """Open where the rule is met.

        Args:
            found: per read site [b, d] float32.
        """
        values = {name: one.of_prompts(found) for name, one in self._readings.items()}
        met = {text: _beyond(one, values[one.reading], one.value) for text, one in self._comparisons.items()}
        return Decision(self._rule(met))

    def _edited(
        self, site: Site, h: Tensor, prepared: Prepared, tokens: Tokens, decision: Decision, state: Any
    ) -> Tensor:
        return self._method.edit(h, prepared, tokens)

    def explain(self, found: Mapping[Site, Tensor], strength: float) -> list[dict[str, Any]]:
        """Readings and decision, per row.

        Args:
            found: per read site [b, d] float32.
            strength: at which it would steer.
        """
        flags = self.decide(found).is_open.tolist()
        values = {name: one.of_prompts(found).tolist() for name, one in self._readings.items()}
        return [
            {
                "open": flag,
                "gain": strength if flag else 0.0,
                "rule": str(self._rule),
                "readings": {name: value[row] for name, value in values.items()},
            }
            for row, flag in enumerate(flags)
        ]


@dataclass
class _Kept:
    """What is kept of one text.

    Attributes:
        seen: where the pass under way has been read.
        found: its readings [b, t], by name.
        chosen: of the pass under way, see `Tokens.chosen`.
        is_open: [b, t, 1] which of its tokens are written; None while not all is read.
        held: by comparison which tokens of the latest pass met it, with the one before it in front: the column of that
            one, and [b, t + 1].
    """

    seen: set[Site] = field(default_factory=set)
    found: dict[str, Tensor] = field(default_factory=dict)
    chosen: Tensor | None = None
    is_open: Tensor | None = None
    held: dict[str, tuple[int | Tensor, Tensor]] = field(default_factory=dict)


class TokenGate:
    """Decides about each token by readings of itself.

    Args:
        when: the rule.
        readings: of the vectors that it names.
        method: what writes the tokens that are open.
        writes: where is written.

    Raises:
        ScopeError: a vector is read only later than is written.
    """

    def __init__(
        self, when: When, readings: Mapping[str, VectorReading], method: Method, writes: Sequence[Site]
    ) -> None:
        self._when, self._method, self._comparisons = when, method, when.comparisons
        self._at: dict[Site, dict[str, SiteReading]] = {}
        for name, one in readings.items():
            early = [site for site in one.sites if all(is_before(site, write) for write in writes)]
            if not early:
                first = min(writes, key=lambda site: site.layer)
                raise ScopeError(
                    f"when({when}): {name} is read at {', '.join(map(str, one.sites))}, later than {first}, which is "
                    "written, so it cannot decide about the same token; leave per token out, or read another vector"
                )
            site = max(early, key=lambda site: site.layer)
            self._at.setdefault(site, {})[name] = one.at(site)
        self._holds = any(one.off is not None for one in self._comparisons.values())

    @property
    def reads(self) -> tuple[Site, ...]:
        """Where it reads."""
        return tuple(self._at)

    def begin(self, rows: int, device: torch.device) -> _Kept:
        """A new state: nothing is open.

        Args:
            rows: of the text.
            device: unused; the tensors say it themselves.
        """
        return _Kept()

    def decides(self, tokens: Tokens, state: _Kept) -> bool:
        """Never later than it writes.

        Args:
            tokens: unused.
            state: unused.
        """
        return False

    def finish(self, state: _Kept) -> bool:
        """No row has to be run again.

        Args:
            state: unused.
        """
        return False

    def read(self, site: Site, h: Tensor, tokens: Tokens, state: _Kept) -> None:
        """Read every token of a pass; with the last site, decide.

        Args:
            site: where it is read.
            h: [b, t, d].
            tokens: of the pass.
            state: of the text.

        Raises:
            ScopeError: nobody can tell where the prompt ends, or tokens are held open while rows change places.
        """
        if not state.seen or site in state.seen:  # a pass begins, perhaps after one that was broken off
            state.seen.clear()
            state.chosen = tokens.chosen("a gate decides from the prompt's end on")
        state.seen.add(site)
        for name, one in self._at[site].items():
            state.found[name] = one.of(h, state.chosen)
        if len(state.seen) < len(self._at):
            return
        found = {name: values.to(h.device) for name, values in state.found.items()}
        met = {text: self._met(one, text, found[one.reading], tokens, state) for text, one in self._comparisons.items()}
        is_open = self._when.rule(met)
        if state.chosen is not None:
            is_open = is_open & (state.chosen >= 0).to(h.device)
        state.is_open = is_open[..., None]
        state.seen.clear()
        state.found.clear()

    def _met(self, one: Comparison, text: str, values: Tensor, tokens: Tokens, state: _Kept) -> Tensor:
        """Which tokens [b, t] meet a comparison."""
        met = _beyond(one, values, one.value)
        if one.off is None:
            return met
        if tokens.moves_rows:
            raise ScopeError(f"when({self._when}): off cannot follow beams; leave it out, or generate with num_beams=1")
        kept = _beyond(one, values, one.off)
        if state.chosen is not None:  # a text begins anew with its answer
            met, kept = (side & (state.chosen >= 0).to(side.device) for side in (met, kept))
        start, width = tokens.columns
        before = _before(state.held.get(text), start, met)
        opens, closes = torch.cat([before, met], dim=1), torch.cat([~before, ~kept], dim=1)
        place = torch.arange(width + 1, device=met.device)
        held = torch.where(opens, place, -1).cummax(dim=1)[0] > torch.where(closes, place, -1).cummax(dim=1)[0]
        state.held[text] = (start, held)
        return held[:, 1:]

    def write(self, site: Site, h: Tensor, prepared: Prepared, tokens: Tokens, state: _Kept) -> Tensor:
        """Change the tokens that are open as the method does.

        Args:
            site: unused.
            h: [b, t, d].
            prepared: what the method prepared.
            tokens: of the pass.
            state: of the text.

        Returns:
            [b, t, d]
        """
        assert state.is_open is not None
        edited = self._method.edit(h, prepared, tokens).to(h.dtype)
        return torch.where(state.is_open.to(h.device), edited, h)

    def explain(self, found: Mapping[Site, Tensor], strength: float) -> list[dict[str, Any]]:
        """Nothing: a prompt decides about no token.

        Args:
            found: unused, per read site [b, d].
            strength: unused.
        """
        return []


def gate_of(
    model: nn.Module, vector: SteeringVector, method: Method, writes: Sequence[Site], tokenizer: Any = None
) -> Editor | None:
    """What decides where a vector is written: the gate of its method, or that of its `when`; None for none.

    Args:
        model: the model.
        vector: as it is to be applied.
        method: of the vector.
        writes: where it is written.
        tokenizer: the model's, where it is known.

    Raises:
        VectorMismatchError: it would have two.
        SteerError: what its `when` reads cannot be had, or not in time.
    """
    editor = editor_of(method, vector)
    if vector.when is None:
        return editor
    if editor is not None:
        raise VectorMismatchError(
            f"{method.name}: the vector has a gate of its own, so when({vector.when}) cannot be set; leave it out, or "
            "gate a vector of another method"
        )
    when = vector.when.bound(SteeringVector.load)
    readings = {name: VectorReading(model, name, one, tokenizer) for name, one in when.vectors}
    return TokenGate(when, readings, method, writes) if when.per_token else PromptGate(when, readings, method)


def _beyond(one: Comparison, values: Tensor, threshold: float) -> Tensor:
    """On which side of a threshold readings lie."""
    return values > threshold if one.above else values < threshold


def _before(held: tuple[int | Tensor, Tensor] | None, start: int | Tensor, like: Tensor) -> Tensor:
    """Whether a comparison was met at the token [b, 1] before a pass, as the pass that had it says."""
    if held is None:
        return torch.zeros_like(like[:, :1])
    begun, flags = held
    place = start - begun
    if isinstance(place, Tensor):
        return flags.index_select(1, place.reshape(1).clamp(0, flags.shape[1] - 1))
    if not 0 <= place < flags.shape[1]:
        return torch.zeros_like(like[:, :1])
    return flags[:, place : place + 1]
