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
from steerkit.tokens.clock import Hook

if TYPE_CHECKING:
    from steerkit.steering.edits_at_sites import Edit

__all__ = ["attached_edits", "make_compiled_code_see_hooks", "refuse_compiled_model"]


class _Dispatcher(Hook):
    """The one steering hook of a module and side: applies its edits in order."""

    def __init__(self) -> None:
        self.edits: list[Edit | Reading] = []
        self.handle: Any = None


class _InputDispatcher(_Dispatcher):
    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tap = self.edits[0].tap
        before = h = tap.read(args, kwargs)
        for edit in self.edits:
            h = edit(h)
        return None if h is before else tap.write_input(args, kwargs, h)


class _OutputDispatcher(_Dispatcher):
    def __call__(self, _module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        tap, plain = self.edits[0].tap, type(output) is Tensor
        before = h = output if plain else tap.read((), {}, output)
        for edit in self.edits:
            h = edit(h, args)
        if h is before:
            return None
        return h if plain else tap.write_output(output, h)


@contextlib.contextmanager
def attached_edits(edit: Edit | Reading) -> Iterator[None]:
    """Append an edit to its module's dispatcher, which comes with its first edit and goes with its last."""
    module, is_input = edit.tap.module, edit.tap.side == "input"
    kind = _InputDispatcher if is_input else _OutputDispatcher
    hooks = module._forward_pre_hooks if is_input else module._forward_hooks
    dispatcher = next((hook for hook in hooks.values() if isinstance(hook, kind)), None)
    if dispatcher is None:
        dispatcher = kind()
        dispatcher.handle = (
            module.register_forward_pre_hook(dispatcher, prepend=True, with_kwargs=True)
            if is_input
            else module.register_forward_hook(dispatcher, prepend=True)
        )
    dispatcher.edits.append(edit)
    try:
        yield
    finally:
        # By identity and from the end: one plan may be attached twice.
        place = max(index for index, other in enumerate(dispatcher.edits) if other is edit)
        del dispatcher.edits[place]
        if not dispatcher.edits:
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
