"""Gates beside torch.compile: a model compiled as a whole is refused, compiled blocks run uncompiled where gates are.

A gate looks at values on the host and may feed the end of a prompt again. Compiled code keeps what it did when it was
traced, so none of that may happen inside it. Where blocks are compiled one by one, all others stay as they are.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from steerkit.errors import ModelError
from steerkit.network.decoder import Decoder
from steerkit.steering.edits_at_sites import Edit, GuidedEdit

__all__ = ["gates_uncompiled", "refuse_compiled_model"]

# By block: its compiled call, and how many contexts hold it back.
_HELD: weakref.WeakKeyDictionary[nn.Module, tuple[Any, int]] = weakref.WeakKeyDictionary()


def refuse_compiled_model(model: nn.Module, decoder: Decoder, edits: Sequence[Edit]) -> None:
    """Refuse gated vectors on a model that was compiled as a whole: its code would keep the first prompt's decision.

    Args:
        model: as it was given, wrapped or not.
        decoder: its decoder.
        edits: what steers it.

    Raises:
        ModelError: the model or its body is compiled, or a block was replaced by what `torch.compile` gives.
    """
    if not any(isinstance(edit, GuidedEdit) for edit in edits):
        return
    whole = [one for one in (model, decoder.model, decoder.body) if _compiled_call(one) is not None]
    if whole or any(hasattr(one, "_orig_mod") for one in (model, decoder.model, decoder.body, *decoder.blocks)):
        raise ModelError(
            "a gated vector cannot steer a compiled model: load it anew, and compile its blocks (`block.compile()`)"
        )


@contextlib.contextmanager
def gates_uncompiled(decoder: Decoder, edits: Sequence[Edit]) -> Iterator[None]:
    """Let blocks that were compiled by themselves run uncompiled where a gate reads or writes.

    Args:
        decoder: of the model that is steered.
        edits: what steers it.
    """
    layers = {tap.site.layer for edit in edits if isinstance(edit, GuidedEdit) for tap in edit.taps}
    blocks = [decoder.blocks[layer] for layer in sorted(layers)]
    held = [block for block in blocks if block in _HELD or _compiled_call(block) is not None]
    for block in held:
        call, count = _HELD.get(block, (_compiled_call(block), 0))
        _HELD[block] = call, count + 1
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block in held:
            call, count = _HELD.pop(block)
            if count > 1:
                _HELD[block] = call, count - 1
            else:
                block._compiled_call_impl = call


def _compiled_call(module: nn.Module) -> Any:
    """What `module.compile()` has left on a module; None where it was not called."""
    return getattr(module, "_compiled_call_impl", None)
