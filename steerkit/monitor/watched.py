"""Monitor: how far a model's activations lie along a vector's direction, for prompts, answers, and while it generates.

    proj(text) = a . u          cos(text) = a . u / |a|          u = v / |v|, at the vector's site
    calibrated = (proj(text) - mean over neutral texts) / standard deviation over neutral texts

with `a` the activation of the prompt's last token (read without any answer: what the model is about to be like) or the
mean over the answer's tokens. Of a vector with several sites the number is the mean over sites of the calibrated
numbers, brought to standard deviation 1 over the neutral texts again; uncalibrated, the mean of the projections.

Chen, Arditi, Sleight, Evans, Lindsey (2025), "Persona Vectors: Monitoring and Controlling Character Traits in Language
Models", arXiv 2507.21509.

Where this file departs. The paper shows raw projections; here they count in standard deviations of shipped neutral
texts unless asked otherwise, so that vectors and layers can be compared. As the paper finds, the number tells
conditions (system prompts, many-shot prompts) apart better than single answers under one condition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.errors import DataError, ScopeError
from steerkit.network.sites import Site
from steerkit.network.tap import Tap
from steerkit.tokens.clock import Hook, PassClock
from steerkit.tokens.forward_pass import Pass
from steerkit.tokens.scope import Scope

if TYPE_CHECKING:
    from steerkit.monitor.monitor import Monitor, Read

__all__ = ["Opening", "Reading", "Step", "Watched"]

_RESPONSE = Scope("response")


class Step(NamedTuple):
    """What one pass of `generate` has shown.

    Attributes:
        number: generated tokens read so far, 0 at the prompt's end.
        values: [b] of the token just read: the prompt's last, or one of the response; nan for rows that have ended.
        mean: [b] of the response so far; nan where nothing of it has been read.
    """

    number: int
    values: Tensor
    mean: Tensor


class Watched:
    """What `Monitor.watch` has read. Made by it.

    Attributes:
        calls: one entry per call of `generate`, in order. `steerkit.generate` makes one per batch, sorted by length.
    """

    def __init__(self, monitor: Monitor, clock: PassClock, callback: Callable[[Step], object] | None) -> None:
        self._monitor, self._clock, self._callback = monitor, clock, callback
        self.calls: list[WatchedCall] = []

    @property
    def last(self) -> WatchedCall:
        """The latest call of `generate`.

        Raises:
            DataError: there was none.
        """
        if not self.calls:
            raise DataError("watch: the model has generated nothing yet")
        return self.calls[-1]

    def open(self, ids: Any) -> None:
        """Note the token ids of a pass that is about to run.

        Args:
            ids: [b, t], or None where embeddings are given.

        Raises:
            ScopeError: rows change their places (beams).
        """
        facts = self._facts()
        if facts is None:
            return
        call: WatchedCall | None = facts.store.get(self)
        if call is None:
            call = facts.store[self] = WatchedCall(self._monitor, self._clock.settings, facts)
            self.calls.append(call)
        call.ids, call.read = ids, {}

    def take(self, site: Site, tap: Tap, h: Tensor) -> None:
        """Read a site in the pass under way.

        Args:
            site: which.
            tap: how.
            h: [b, t, d], or rows and tokens in one dimension.
        """
        facts = self._facts()
        call: WatchedCall | None = None if facts is None else facts.store.get(self)
        if facts is None or call is None:
            return
        shaped = h.reshape(facts.batch, facts.width, -1) if tap.flat else h
        place = call.place(facts)
        if place is None:
            return
        rows = torch.arange(facts.batch, device=h.device)
        # A copy: some models add into what flows on in place.
        call.read[site] = shaped[rows, place.to(h.device)].detach().float()
        if len(call.read) == len(self._monitor._taps):
            step = call.add(facts)
            if self._callback is not None:
                self._callback(step)

    def _facts(self) -> Pass | None:
        """The pass under way, where it belongs to a `generate`.

        Raises:
            ScopeError: it is being compiled.
        """
        if torch.compiler.is_compiling():
            raise ScopeError("watch: compiled code cannot be read; run the model eagerly (disable_compile=True)")
        facts = self._clock.now
        if facts is None or facts.suspended or facts.is_probe or facts.is_apart or facts.boundary is None:
            return None
        return facts


class WatchedCall:
    """What has been read in one call of `generate`.

    Attributes:
        prompt: [b] of the prompt's last token; None where it has not been read.
        values: per response token [b]; nan for rows that have ended.
        mean: [b] of the response so far; nan where nothing of it has been read.
    """

    def __init__(self, monitor: Monitor, settings: Any, facts: Pass) -> None:
        if (getattr(settings, "num_beams", None) or 1) > 1:
            raise ScopeError("watch: beams change their rows from step to step; score the finished texts instead")
        ends = [getattr(settings, name, None) for name in ("eos_token_id", "pad_token_id")]
        self._ends, self._pads = (
            torch.tensor([] if end is None else end, dtype=torch.long, device=facts.device).flatten() for end in ends
        )
        self.prompt: Tensor | None = None
        self.values: list[Tensor] = []
        self.ids: Tensor | None = None
        self.read: dict[Site, Tensor] = {}
        self.mean = torch.full((facts.batch,), torch.nan, device=facts.device)
        self._monitor = monitor
        self._finished = torch.zeros(facts.batch, dtype=torch.bool, device=facts.device)
        self._sums: dict[Site, Tensor] = {}
        self._count = torch.zeros(facts.batch, device=facts.device)

    @property
    def tokens(self) -> Tensor:
        """[b, t] one number per response token that the model has read; nan for rows that have ended."""
        return torch.stack(self.values, dim=1) if self.values else self.mean.new_zeros(len(self.mean), 0)

    def place(self, facts: Pass) -> Tensor | None:
        """[b] which column of a pass is read; None where none is.

        Args:
            facts: the pass.

        Raises:
            ScopeError: the pass holds tokens that may be thrown away again (assisted decoding).
        """
        past = facts.past if isinstance(facts.past, int) else int(facts.past)
        assert facts.boundary is not None
        end = past + facts.width
        if end <= facts.boundary:
            return facts.tokens(_RESPONSE).last_prompt()
        if end != facts.boundary + len(self.values) + 1:
            raise ScopeError(
                "watch: this pass holds several tokens behind the prompt, which may be thrown away again (assisted "
                "decoding); score the finished texts instead"
            )
        return torch.full((facts.batch,), facts.width - 1, device=facts.device)

    def add(self, facts: Pass) -> Step:
        """Keep what all sites have shown of one token per row.

        Args:
            facts: the pass.

        Returns:
            The step.
        """
        past = facts.past if isinstance(facts.past, int) else int(facts.past)
        assert facts.boundary is not None
        if past + facts.width <= facts.boundary:
            self.prompt = self._scaled(self.read, "prompt_last")
            return Step(0, self.prompt, self.mean)
        counted = ~self._finished
        if self.ids is not None:
            last = self.ids[:, -1].to(self._finished.device)
            self._finished = self._finished | torch.isin(last, self._ends)
            counted = ~self._finished & ~torch.isin(last, self._pads)
        self._count = self._count + counted
        # The activations themselves: a cosine of means is no mean of cosines.
        means: dict[Site, Tensor] = {}
        for site, h in self.read.items():
            kept = torch.where(counted.to(h.device)[:, None], h, 0.0)
            self._sums[site] = self._sums[site] + kept if site in self._sums else kept
            means[site] = self._sums[site] / self._count.to(h.device)[:, None]
        self.mean = self._scaled(means, "response_mean")
        self.values.append(torch.where(counted, self._scaled(self.read, "response_mean"), torch.nan))
        return Step(len(self.values), self.values[-1], self.mean)

    def _scaled(self, rows: Mapping[Site, Tensor], read: Read) -> Tensor:
        """[b] one number of the activations [b, d] at all sites."""
        columns = [self._monitor.along(site, rows[site]).to(self.mean.device) for site in self._monitor._units]
        return self._monitor.scaled(torch.stack(columns, dim=-1), differences=False, read=read)


class Opening(Hook):
    def __init__(self, watched: Watched) -> None:
        self.watched = watched

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.watched.open(kwargs.get("input_ids", args[0] if args else None))


class Reading(Hook):
    def __init__(self, watched: Watched, site: Site, tap: Tap) -> None:
        self.watched, self.site, self.tap = watched, site, tap

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        """Both as a hook before a module and after it."""
        self.watched.take(self.site, self.tap, self.tap.read(args, kwargs, *output))
