"""The one hook that a steered module has: it applies the edits of all vectors there, in order."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from steerkit.errors import ModelError
from steerkit.network.decoder import Decoder
from steerkit.steering.edits_at_sites import GuidedEdit
from steerkit.steering.replay import Reading
from steerkit.tokens.clock import Hook, PassClock

if TYPE_CHECKING:
    from steerkit.steering.edits_at_sites import Edit

__all__ = ["attached_edits", "make_compiled_code_see_hooks", "refuse_compiled_model"]


class _Dispatcher(Hook):
    """The one steering hook of a module and side: applies its edits in order.

    Threads that steer one model at once each have edits of their own here. What is there is replaced as a whole, never
    changed, because a pass of another thread may be going through it.
    """

    def __init__(self, clock: PassClock) -> None:
        self.clock = clock
        self.edits: tuple[Edit | Reading, ...] = ()
        self.entries: tuple[tuple[int, Edit | Reading], ...] = ()
        self.handle: Any = None

    def keep(self, entries: Sequence[tuple[int, Edit | Reading]]) -> None:
        """Replace what is there."""
        self.entries, self.edits = tuple(entries), tuple(edit for _, edit in entries)

    def present(self) -> Sequence[Edit | Reading]:
        """The edits for the pass that this thread is in."""
        edits, entries = self.edits, self.entries  # before it is asked whether they are several threads'
        return self.clock.own(entries) if self.clock.is_shared else edits


class _InputDispatcher(_Dispatcher):
    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        edits = self.present()
        if not edits:
            return None
        tap = edits[0].tap
        before = h = tap.read(args, kwargs)
        for edit in edits:
            h = edit(h)
        return None if h is before else tap.write_input(args, kwargs, h)


class _OutputDispatcher(_Dispatcher):
    def __call__(self, _module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        edits = self.present()
        if not edits:
            return None
        tap, plain = edits[0].tap, type(output) is Tensor
        before = h = output if plain else tap.read((), {}, output)
        for edit in edits:
            h = edit(h, args)
        if h is before:
            return None
        return h if plain else tap.write_output(output, h)


@contextlib.contextmanager
def attached_edits(edit: Edit | Reading, clock: PassClock, owner: int) -> Iterator[None]:
    """Append an edit to its module's dispatcher, which comes with its first edit and goes with its last.

    Args:
        edit: the edit.
        clock: on the model, attached.
        owner: the thread that steers.
    """
    module, is_input = edit.tap.module, edit.tap.side == "input"
    kind = _InputDispatcher if is_input else _OutputDispatcher
    hooks = module._forward_pre_hooks if is_input else module._forward_hooks
    dispatcher = next((hook for hook in hooks.values() if isinstance(hook, kind)), None)
    if dispatcher is None:
        dispatcher = kind(clock)
        dispatcher.keep([(owner, edit)])
        dispatcher.handle = (
            module.register_forward_pre_hook(dispatcher, prepend=True, with_kwargs=True)
            if is_input
            else module.register_forward_hook(dispatcher, prepend=True)
        )
    else:
        dispatcher.keep([*dispatcher.entries, (owner, edit)])
    try:
        yield
    finally:
        entries = list(dispatcher.entries)
        # By identity and from the end: one plan may be attached twice, and by two threads.
        del entries[max(place for place, one in enumerate(entries) if one[0] == owner and one[1] is edit)]
        dispatcher.keep(entries)
        if not entries:
            dispatcher.handle.remove()


def refuse_compiled_model(model: nn.Module, decoder: Decoder, edits: Sequence[Edit]) -> None:
    """Refuse gated vectors on a compiled model: compiled code would keep the first prompt's decision.

    Raises:
        ModelError: the model or one of its blocks is compiled.
    """
    if not any(isinstance(edit, GuidedEdit) for edit in edits):
        return
    modules = [model, decoder.model, decoder.body, *decoder.blocks]
    if any(hasattr(one, "_orig_mod") or getattr(one, "_compiled_call_impl", None) is not None for one in modules):
        raise ModelError("a gated vector cannot steer a compiled model: load it anew, without torch.compile")


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
