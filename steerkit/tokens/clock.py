"""The clock of a steered model: two hooks that note, before every forward pass, which tokens the pass carries.

An edit inside a block sees a tensor [b, t, d] and nothing else. Which tokens of the text these are, which of them are
pads, and where the prompt ends, only the model's own call can tell. So a `PassClock` hooks the outermost transformers
model, and its decoder body for people who call that one alone, and keeps the facts of the pass that each thread is in
as a `Pass`, for whoever asks inside it.

Inside `generate` it is certain where the prompt ends, in every mode of decoding. In any other forward pass nobody can
know, so scopes that depend on the prompt's end need `prompt_lengths` there.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from steerkit.errors import ModelError, SteerError
from steerkit.tokens.decoding import Decoding
from steerkit.tokens.forward_pass import Pass
from steerkit.tokens.generate_call import GenerateCall
from steerkit.tokens.generate_frames import GenerateFrames
from steerkit.tokens.pass_reader import PassReader
from steerkit.tokens.texts import Texts

__all__ = ["Hook", "PassClock"]

_Any = TypeVar("_Any")


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

    Attributes:
        owners: by thread, how often it has attached. A thread of several that steer at once has its own contexts alone.
        is_shared: whether several threads steer, or have just now.
        is_compiled: whether code was compiled with its hooks on the model. Then they stay for good: other ones would be
            compiled anew.
    """

    def __init__(self, model: nn.Module, body: nn.Module) -> None:
        # Weak: a hook must not keep a model alive.
        self._model, self._body = weakref.ref(model), weakref.ref(body)
        self._local = threading.local()
        self._handles: list[Any] = []
        self._names = {id(module): tuple(inspect.signature(module.forward).parameters) for module in (model, body)}
        self._frames, self._texts = GenerateFrames(model, body), Texts(self._local)
        self._reader = PassReader(model, body, self._frames, self._texts, self._local)
        self._checks: list[Callable[[], None]] = []
        self.owners: dict[int, int] = {}
        self.is_shared = self.is_compiled = self._runs = False
        self._refused: SteerError | None = None

    @staticmethod
    def of(model: nn.Module) -> PassClock | None:
        """The clock that already hangs on a transformers model, if any."""
        for hook in model._forward_pre_hooks.values():
            holder = getattr(hook, "clock", None)
            if isinstance(holder, PassClock):
                return holder
        return None

    def attach(self) -> int:
        """Hang the hooks on the model where they are not there yet.

        Returns:
            The thread, for `detach`.
        """
        owner = threading.get_ident()
        self._local.owner = owner
        self._keep({**self.owners, owner: self.owners.get(owner, 0) + 1})
        if self._handles:
            return owner
        model, body = self._model(), self._body()
        try:
            for module in {id(model): model, id(body): body}.values():
                if module is not None:
                    before, after = _Before(self), _After(self)
                    self._handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
                    self._handles.append(module.register_forward_hook(after, always_call=True))
        except BaseException:
            self.detach(owner)
            raise
        return owner

    def detach(self, owner: int) -> None:
        """Take the hooks off when their last user goes, unless code was compiled with them.

        Args:
            owner: what `attach` gave.
        """
        self._keep({**self.owners, owner: self.owners[owner] - 1})
        if not self.is_compiled:
            self.release()

    def release(self) -> None:
        """Take the hooks off if nobody steers, even where code was compiled with them: it is compiled anew then."""
        if not self.owners:
            self.is_compiled = False
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _keep(self, owners: Mapping[int, int]) -> None:
        """Replace the threads; passes of any of them may be under way, and compiled code may not look at a number."""
        self.owners = {thread: count for thread, count in owners.items() if count > 0}
        self._runs = bool(self.owners)
        self.is_shared = self._runs and (self.is_shared or len(self.owners) > 1)

    def own(self, entries: Sequence[tuple[int, _Any]]) -> tuple[_Any, ...]:
        """What of several threads' things is for the pass that this thread is in.

        A thread that has attached has its own. Any other, such as one that runs `generate` for a streamer, has those of
        the only thread that has.

        Args:
            entries: each with the thread that attached it.

        Raises:
            ModelError: several threads have attached, and this one has not.
        """
        if not self.is_shared:
            return tuple(one for _, one in entries)
        owners, own = self.owners, getattr(self._local, "owner", None)
        if own not in owners:
            if len(owners) > 1:
                raise ModelError(
                    f"{len(owners)} threads steer this model at once, and the one that runs this pass is none of them; "
                    "enter steer() in the thread that runs the model"
                )
            own = next(iter(owners), None)
        return tuple(one for owner, one in entries if owner == own)

    def take_refused(self) -> SteerError | None:
        """What a hook has refused in a thread other than the one that steers, once; None if nothing."""
        refused, self._refused = self._refused, None
        return refused

    @contextlib.contextmanager
    def checking(self, check: Callable[[], None]) -> Iterator[None]:
        """Ask before every pass whether the model is still the one that was hooked.

        Args:
            check: raises if it is not. It runs in every pass, so it may cost next to nothing.
        """
        self._checks.append(check)
        try:
            yield
        finally:
            self._checks.remove(check)

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

    @contextlib.contextmanager
    def decoding(self, rows: Decoding) -> Iterator[None]:
        """Say what the rows of this thread's next passes are, which a loop other than `generate` runs.

        Args:
            rows: of each of these passes.
        """
        before = getattr(self._local, "decoding", None)
        self._local.decoding = rows
        try:
            yield
        finally:
            self._local.decoding = before

    @property
    def settings(self) -> Any:
        """The settings of the `generate` call of this model that this thread is in; None outside of one."""
        return self._frames.prompt()[1]

    @property
    def is_suspended(self) -> bool:
        """Whether this thread has switched the edits off."""
        return getattr(self._local, "suspended", False)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Run forward passes of this thread without any edit, for probes and recordings of the baseline model."""
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
        call = self._going_on
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
        call = self._going_on
        if call is not None:
            call.columns = columns
        self._local.aside = {"store": facts.store}
        try:
            yield
        finally:
            self._local.aside = None

    @property
    def _going_on(self) -> Decoding | GenerateCall | None:
        """What counts the columns of this thread's passes."""
        return getattr(self._local, "decoding", None) or self._texts.call

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
            ModelError: the model itself gets this mode wrong (a Mamba cache continued by a second `generate`), or a
                hooked module has been replaced.
        """
        if not self._runs:  # left behind for compiled code
            return
        is_compiling = torch.compiler.is_compiling()
        if is_compiling:
            self.is_compiled = True
        live = self._live()
        if live is None and not is_compiling:
            for check in self._checks:
                check()
        given = self.arguments(module, args, kwargs)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        facts: Pass | None = None
        if isinstance(tokens, Tensor) and tokens.dim() >= 2:
            if live is not None and module is not live.module and module is self._body():
                facts = live.facts  # the body inside its model: the outer facts win (it saw the 2-D mask)
                if facts is not None and (facts.batch, facts.width) != (tokens.shape[0], tokens.shape[1]):
                    facts = None
            facts = self._reader.read(tokens, given) if facts is None else facts
        frame = None if is_compiling else sys._getframe(2)
        self._local.live = _Live(module, facts, frame, live)

    def note_refusal(self, error: BaseException | None) -> None:
        """Keep what ended a pass in another thread, where whoever runs it may not tell.

        Args:
            error: what ended the pass; None where nothing did.
        """
        # Of several threads that steer, none has to do with what a further one ran.
        if isinstance(error, SteerError) and len(self.owners) == 1 and threading.get_ident() not in self.owners:
            self._refused = error

    def leave(self, module: nn.Module, output: Any = None) -> None:
        """Forget the facts of the pass that has just run.

        Args:
            module: what ran.
            output: what it gave; what the pass kept goes on with a cache that was made in it.
        """
        live: _Live | None = getattr(self._local, "live", None)
        if live is not None and live.facts is not None and live.facts.store and not torch.compiler.is_compiling():
            self._texts.hand_on(live.facts.store, output)
        while live is not None:
            done, live = live.module is module, live.outer
            if done:
                break
        self._local.live = live

    def _live(self) -> _Live | None:
        """The pass this thread is in, without those an interrupt left behind (torch calls no closing hook then)."""
        live: _Live | None = getattr(self._local, "live", None)
        if live is None or torch.compiler.is_compiling():
            return live
        while live is not None and live.frame is not None and not _is_running(live.frame):
            live = live.outer
        return live


def _is_running(frame: Any) -> bool:
    """Whether a frame is on the stack of this thread; that of a pass around the present one is a few calls up."""
    caller: Any = sys._getframe(2)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None


class _Live(NamedTuple):
    """A pass under way: which module noted it, in which frame, and the pass around it."""

    module: nn.Module
    facts: Pass | None
    frame: Any
    outer: Any


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
        if (
            output is None and not torch.compiler.is_compiling()
        ):  # torch calls this one while an error is on its way too
            self.clock.note_refusal(sys.exc_info()[1])
        self.clock.leave(module, output)
