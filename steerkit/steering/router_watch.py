"""Whether a router that is steered ran at all: a kernel that stands in for the whole MLP would pass over its hook."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from steerkit.errors import ModelError
from steerkit.network.tap import RouterTap, Tap

__all__ = ["watched_router"]


@contextlib.contextmanager
def watched_router(tap: Tap) -> Iterator[None]:
    """Raise in a pass in which an MLP ran and its steered router did not; at other places nothing is watched.

    Args:
        tap: where is written.
    """
    if not isinstance(tap, RouterTap):
        yield
        return
    state = threading.local()  # two threads may run one model at once

    def enter(*_: Any) -> None:
        if not torch.compiler.is_compiling():
            state.ran = False

    def note(*_: Any) -> None:
        if not torch.compiler.is_compiling():
            state.ran = True

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        if not torch.compiler.is_compiling() and not getattr(state, "ran", True):
            raise ModelError(
                f"{tap.site}: the MLP ran without `{tap.name}`, in a kernel that no hook sees into, so its experts "
                "were not steered; load the model with use_kernels=False"
            )

    with contextlib.ExitStack() as stack:
        for handle in (
            tap.owner.register_forward_pre_hook(enter),
            tap.module.register_forward_hook(note),
            tap.owner.register_forward_hook(leave),
        ):
            stack.callback(handle.remove)
        yield
