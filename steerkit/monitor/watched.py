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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steerkit.errors import DataError, ScopeError
from steerkit.monitor.watched_call import Step, WatchedCall
from steerkit.network.sites import Site
from steerkit.network.tap import Tap
from steerkit.tokens.clock import Hook, PassClock
from steerkit.tokens.forward_pass import Pass

if TYPE_CHECKING:
    from steerkit.monitor.monitor import Monitor

__all__ = ["Opening", "Reading", "Watched"]


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
