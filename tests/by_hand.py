"""Steering written out by hand: a hook that adds a direction to some columns of what a block gives, and no more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def blocks_of(model: Any) -> nn.ModuleList:
    """The first list of as many modules as the config says there are layers."""
    depth = model.config.get_text_config().num_hidden_layers
    places = (*model.get_decoder().modules(), *model.base_model.modules())
    return next(each for each in places if isinstance(each, nn.ModuleList) and len(each) == depth)


def stream_of(output: Any) -> Tensor:
    """What a block gives, out of the tuple or list in which it stands."""
    stream: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return stream


def columns_of(scope: str, first: Tensor, prompt: int, total: int) -> Tensor:
    """Which cells [b, total] a scope means, where the text of row i starts at column first[i].

    Args:
        scope: one that needs no marks.
        first: [b].
        prompt: columns of the prompt, pads included.
        total: columns of prompt and answer.
    """
    columns = torch.arange(total)[None]
    real = columns >= first[:, None]
    if scope.startswith("first("):
        return real & (columns < first[:, None] + int(scope[6:-1]))
    if scope.startswith(("response(", "generated(")):
        start = prompt - scope.startswith("response")
        return real & (columns >= start) & (columns < start + int(scope.partition("(")[2][:-1]))
    borders = {"prompt": (0, prompt), "response": (prompt - 1, total), "generated": (prompt, total), "all": (0, total)}
    low, high = borders[scope]
    return real & (columns >= low) & (columns < high)


@contextlib.contextmanager
def adding(block: nn.Module, added: Tensor, written: Tensor) -> Iterator[None]:
    """Add a direction to what a block gives, counting columns over the passes of one `generate`.

    Args:
        block: whose output is written.
        added: [d].
        written: [b, columns] which of them.
    """
    seen = 0

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        nonlocal seen
        stream = stream_of(output)
        whole = seen == 0 or stream.shape[1] == seen + 1  # all columns from the first, or one new one
        seen = stream.shape[1] if whole else seen + 1
        # RWKV's cached steps give as many columns as there are rows: they are one column to whoever steers.
        mask = written[:, :seen, None] if whole else written[:, seen - 1 : seen, None]
        steered = stream + mask * added
        return steered if stream is output else type(output)((steered, *output[1:]))

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
