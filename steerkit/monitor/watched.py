"""Watching a model while it generates: hooks that read a monitor's sites in every pass of `generate`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steerkit.errors import DataError, ModelError, ScopeError
from steerkit.monitor.items import READS
from steerkit.monitor.watched_call import Step, WatchedCall
from steerkit.network.placement import Placement
from steerkit.network.sites import Site
from steerkit.network.tap import Tap
from steerkit.tokens.clock import Hook, PassClock
from steerkit.tokens.forward_pass import Pass

if TYPE_CHECKING:
    from steerkit.monitor.monitor import Monitor

__all__ = ["Watched", "watching"]


class Watched:
    """What `Monitor.watch` has read. Made by it.

    Attributes:
        calls: one entry per call of `generate`, in order. `steerkit.generate` makes one per batch, sorted by length.
    """

    def __init__(self, monitor: Monitor, clock: PassClock, callback: Callable[[Step], object] | None) -> None:
        self._monitor, self._clock, self._callback = monitor, clock, callback
        self.owner = threading.get_ident()
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
        if len(call.read) == len(self._monitor.taps):
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
        if not self._clock.own(((self.owner, self),)):
            return None  # a pass of another thread, which steers the model by itself
        if facts is None or facts.suspended or facts.is_probe or facts.is_apart or facts.boundary is None:
            return None
        return facts


class _Opening(Hook):
    def __init__(self, watched: Watched) -> None:
        self.watched = watched

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.watched.open(kwargs.get("input_ids", args[0] if args else None))


class _Reading(Hook):
    def __init__(self, watched: Watched, site: Site, tap: Tap) -> None:
        self.watched, self.site, self.tap = watched, site, tap

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        """Both as a hook before a module and after it."""
        self.watched.take(self.site, self.tap, self.tap.read(args, kwargs, *output))


@contextlib.contextmanager
def watching(monitor: Monitor, callback: Callable[[Step], object] | None) -> Iterator[Watched]:
    """Read while a monitor's model generates.

    Args:
        monitor: what is read, and in which scale.
        callback: called after every pass.

    Yields:
        What has been read.

    Raises:
        ModelError: the model is compiled, is being steered from another thread, or a module that is read was replaced.
        DataError: the neutral texts have no answers to calibrate the response on.
    """
    model, decoder = monitor.decoder.model, monitor.decoder
    modules = [monitor.model, model, decoder.body, *decoder.blocks]
    if any(hasattr(one, "_orig_mod") or getattr(one, "_compiled_call_impl", None) is not None for one in modules):
        raise ModelError("watch: compiled code does not call what reads it; load the model without torch.compile")
    if monitor.calibrated:
        for read in READS:  # before, not in the middle of somebody's generate
            monitor.scale(read)
    clock = PassClock.of(model) or PassClock(model, decoder.body)
    if set(clock.owners) - {threading.get_ident()}:
        raise ModelError("watch: this model object is being steered from another thread; leave that context first")
    watched = Watched(monitor, clock, callback)
    with contextlib.ExitStack() as stack:
        stack.callback(clock.detach, clock.attach())
        stack.enter_context(clock.checking(Placement(model, monitor.taps.values()).check))
        # Appended: the clock's own hook comes first, and steering's dispatchers are prepended.
        stack.callback(model.register_forward_pre_hook(_Opening(watched), with_kwargs=True).remove)
        for site, tap in monitor.taps.items():
            hook, module = _Reading(watched, site, tap), tap.module
            if tap.side == "input":
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            else:
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield watched
