"""Keeping transformers' progress bars and messages off the terminal for a while."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

__all__ = ["quiet"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and messages away for a while; the switches are put back as they were."""
    from transformers.utils import logging as chatter

    hub: Any = importlib.import_module("huggingface_hub.utils")
    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    if hub_bars:  # transformers switches both; a download of gigabytes should be seen
        hub.enable_progress_bars()
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()
        if not hub_bars:
            hub.disable_progress_bars()
