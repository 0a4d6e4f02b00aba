"""Arithmetic in the precision of its tensors, inside a caller's autocast too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["full_precision"]


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Switch autocast off for a while; as a decorator, for a whole function.

    A model may run under autocast. What is computed from its activations and weights may not: products of float32
    would come in half precision.
    """
    accelerator = torch.accelerator.current_accelerator()
    with contextlib.ExitStack() as stack:
        for device in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
