"""The one hook that a steered module has: it applies the edits of all vectors there, in order."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from steerkit.steering.replay import Reading
from steerkit.steering.router_watch import watched_router
from steerkit.tokens.clock import Hook, PassClock

if TYPE_CHECKING:
    from steerkit.network.tap import Tap
    from steerkit.steering.edits_at_sites import Edit

__all__ = ["attached_edits", "forget_compiled", "make_compiled_code_see_hooks", "settle"]


class _Dispatcher(Hook):
    """The one steering hook of a module and side: applies its edits in order.

    It hangs on the module while one of its edits does something. Code that was compiled with it would be compiled again
    for another hook, so there it stays behind, without edits, for whoever steers next.

    Threads that steer one model at once each have edits of their own here. What is there is replaced as a whole, never
    changed, because a pass of another thread may be going through it.
    """

    def __init__(self, module: nn.Module, clock: PassClock) -> None:
        self.entries: tuple[tuple[int, Edit | Reading], ...] = ()
        self._edits: tuple[Edit | Reading, ...] = ()
        self._clock = clock
        self._module = weakref.ref(module)
        self._handle: Any = None

    def keep(self, entries: Sequence[tuple[int, Edit | Reading]], clock: PassClock) -> None:
        """Replace what is there.

        Args:
            entries: each with the thread that attached it.
            clock: on the model, attached.
        """
        self._clock = clock
        self.entries, self._edits = tuple(entries), tuple(edit for _, edit in entries)
        self.settle()

    def settle(self) -> None:
        """Hang on the module, or come off, as the edits at their present strengths need it."""
        module = self._module()
        if module is None:
            return
        stays = self._clock.is_compiled
        if self._handle is None and (any(not edit.is_inert for edit in self._edits) or (stays and self._edits)):
            self._handle = self._hang(module)
        elif self._handle is not None and not stays and all(edit.is_inert for edit in self._edits):
            self._handle.remove()
            self._handle = None

    def _hang(self, module: nn.Module) -> Any:
        raise NotImplementedError


class _InputDispatcher(_Dispatcher):
    def _hang(self, module: nn.Module) -> Any:
        return module.register_forward_pre_hook(self, prepend=True, with_kwargs=True)

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        edits, entries = self._edits, self.entries  # before it is asked whether they are several threads'
        if self._clock.is_shared:
            edits = self._clock.own(entries)
        if not edits:
            return None
        tap = edits[0].tap
        before = h = tap.read(args, kwargs)
        for edit in edits:
            h = edit(h)
        return None if h is before else tap.write_input(args, kwargs, h)


class _OutputDispatcher(_Dispatcher):
    def _hang(self, module: nn.Module) -> Any:
        return module.register_forward_hook(self, prepend=True)

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        edits, entries = self._edits, self.entries  # before it is asked whether they are several threads'
        if self._clock.is_shared:
            edits = self._clock.own(entries)
        if not edits:
            return None
        tap, plain = edits[0].tap, type(output) is Tensor
        before = h = output if plain else tap.read((), {}, output)
        for edit in edits:
            h = edit(h, args)
        if h is before:
            return None
        return h if plain else tap.write_output(output, h)


# By module: a dispatcher that has come off for a while keeps its place among the edits of nested contexts.
_DISPATCHERS: WeakKeyDictionary[nn.Module, dict[str, _Dispatcher]] = WeakKeyDictionary()


@contextlib.contextmanager
def attached_edits(edit: Edit | Reading, clock: PassClock, owner: int) -> Iterator[None]:
    """Append an edit to its module's dispatcher, which hangs on the module while one of its edits does something.

    Args:
        edit: the edit.
        clock: on the model, attached.
        owner: the thread that steers.
    """
    found = _DISPATCHERS.setdefault(edit.tap.module, {})
    if edit.tap.side not in found:
        kind = _InputDispatcher if edit.tap.side == "input" else _OutputDispatcher
        found[edit.tap.side] = kind(edit.tap.module, clock)
    dispatcher = found[edit.tap.side]
    try:
        dispatcher.keep([*dispatcher.entries, (owner, edit)], clock)
        with watched_router(edit.tap):
            yield
    finally:
        entries = list(dispatcher.entries)
        # By identity and from the end: one plan may be attached twice, and by two threads.
        del entries[max(place for place, one in enumerate(entries) if one[0] == owner and one[1] is edit)]
        dispatcher.keep(entries, clock)


def settle(taps: Iterable[Tap]) -> None:
    """See to it that modules have a hook where their edits, at the present strengths, need one.

    Args:
        taps: of edits that are attached.
    """
    for tap in taps:
        _DISPATCHERS[tap.module][tap.side].settle()


def forget_compiled(model: nn.Module) -> None:
    """Take off the hooks that stayed behind because code was compiled with them, where nobody steers any more.

    Args:
        model: the transformers model itself. Compiled code of it is compiled anew when it runs again.
    """
    clock = PassClock.of(model)
    if clock is None or clock.owners:
        return
    clock.release()
    for module in model.modules():
        for dispatcher in _DISPATCHERS.get(module, {}).values():
            dispatcher.settle()


def make_compiled_code_see_hooks() -> None:
    """Make compiled code look at hooks; by default code compiled before they were attached ignores them silently.

    torch.compile skips guards on hooks unless told otherwise before it compiles, so what is compiled already has to go
    (once per process). torch 2.13 keeps this setting per thread, hence the default as well: streamers run `generate`
    in a thread of their own.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None or not dynamo.config.skip_nnmodule_hook_guards:
        return
    dynamo.config.skip_nnmodule_hook_guards = False
    entries: Mapping[str, Any] = getattr(dynamo.config, "_config", {})
    if "skip_nnmodule_hook_guards" in entries:
        with contextlib.suppress(AttributeError):
            entries["skip_nnmodule_hook_guards"].default = False
    dynamo.reset()
