"""What form the residual stream has between blocks: one vector a token, as every site promises, or something else.

Hyper-connections (DeepSeek-V4, HY-V4, Qwen4-Exp) and alternating updates (Gemma 3n) carry several streams from block to
block, each family in a layout of its own, and weigh them anew in every half of a block and before the head. No one
vector per token can be read or written there, so `resid_pre`, `resid_post` and what is added to them are refused.

The form is seen in one pass over three tokens for all blocks, once in a model's life.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerkit.network.block_trace import argument_of, run_body, tensor_of
from steerkit.network.decoder import Decoder, execution_device

__all__ = ["TOKENS", "Form", "form_of", "form_text", "forms_noted", "is_token_wise", "plain_tokens"]

TOKENS = 3
"""In the one row of the pass: not one, which is the row, and not four, which are the streams of most such families."""


@dataclass(frozen=True)
class Form:
    """What one block did in the pass; empty where it did not run (a cross-attention block without an image).

    Attributes:
        read: the shape of what it was given, each time it ran; () where that was no tensor.
        gave: the same of what it put out.
    """

    read: list[tuple[int, ...]] = field(default_factory=list)
    gave: list[tuple[int, ...]] = field(default_factory=list)


# By block: whoever takes blocks off, or loads another model, has them looked at again.
_FORMS: WeakKeyDictionary[nn.Module, Form] = WeakKeyDictionary()


def form_of(decoder: Decoder, layer: int) -> Form:
    """The form of one block. The first time, all blocks of the model are seen in one pass.

    Args:
        decoder: the model's decoder.
        layer: the block, counted from 0.

    Raises:
        SiteError: the body fails on plain token ids.
    """
    block = decoder.blocks[layer]
    if block not in _FORMS:
        with plain_tokens(decoder) as input_ids, forms_noted(decoder):
            run_body(decoder.entry, input_ids)
    return _FORMS[block]


@contextlib.contextmanager
def forms_noted(decoder: Decoder) -> Iterator[bool]:
    """Note the forms of all blocks in a pass over plain tokens that somebody makes for reasons of their own.

    Args:
        decoder: the model's decoder.

    Yields:
        Whether the pass has to run to its end: some block's form is not known yet.
    """
    if all(block in _FORMS for block in decoder.blocks):
        yield False
        return
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(_watched(one)) for one in decoder.blocks]
        yield True
    _FORMS.update(zip(decoder.blocks, found, strict=True))


def is_token_wise(shape: Sequence[int], width: int | None = None) -> bool:
    """Whether a tensor of the pass holds one vector for each token, as [b, t, width].

    Args:
        shape: of the tensor.
        width: the only one allowed; None allows any.
    """
    return tuple(shape[:-1]) == (1, TOKENS) and width in (None, shape[-1])


def form_text(shape: Sequence[int]) -> str:
    """The shape of a tensor of the pass in words, such as ``[b, t, 4, 32]``.

    Args:
        shape: of the tensor.
    """
    words = [{1: "b", TOKENS: "t"}.get(size, str(size)) for size in shape[:-1]]
    return f"[{', '.join([*words, str(shape[-1])])}]"


@contextlib.contextmanager
def plain_tokens(decoder: Decoder) -> Iterator[Tensor]:
    """Token ids [1, 3] for a pass that is nobody's: the clock of an outer `steer` does not count it.

    Args:
        decoder: the model's decoder.
    """
    with contextlib.ExitStack() as stack:
        for hook in decoder.model._forward_pre_hooks.values():
            if hasattr(hook, "suspended"):
                stack.enter_context(hook.suspended())
        yield torch.tensor([list(range(1, TOKENS + 1))], device=execution_device(decoder), dtype=torch.long)


@contextlib.contextmanager
def _watched(block: nn.Module) -> Iterator[Form]:
    """Note the shapes of what a block reads and gives."""
    form = Form()

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        form.read.append(_shape(argument_of(args, kwargs)))

    def leave(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        form.gave.append(_shape(tensor_of(output)))

    handles = [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        block.register_forward_hook(leave, prepend=True),
    ]
    try:
        yield form
    finally:
        for handle in handles:
            handle.remove()


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()
