"""The same extraction by other libraries, those that are installed: `pip install 'steerkit[peers]'`.

Each is given the same texts and batches of the same size, and left to work as it does: repeng keeps the hidden states
of each batch and fits a principal component, steering-vectors records with hooks and takes the difference of means.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy

__all__ = ["by_peers"]


def by_peers(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int
) -> dict[str, Callable[[], object]]:
    """What extracts a direction at every block, by the name of the library.

    Args:
        model: the transformers model.
        tokenizer: its tokenizer.
        pairs: texts, positive and negative.
        batch_size: texts per pass.
    """
    found: dict[str, Callable[[], object]] = {}
    if importlib.util.find_spec("repeng"):
        vars(numpy).setdefault("float_", numpy.float64)  # repeng 0.4.0 names what NumPy 2 has no more
        from repeng import ControlVector, DatasetEntry

        entries = [DatasetEntry(positive=positive, negative=negative) for positive, negative in pairs]
        found["repeng"] = _silently(lambda: ControlVector.train(model, tokenizer, entries, batch_size=batch_size))
    if importlib.util.find_spec("steering_vectors"):
        from steering_vectors import train_steering_vector

        found["steering-vectors"] = lambda: train_steering_vector(model, tokenizer, list(pairs), batch_size=batch_size)
    return found


def _silently(work: Callable[[], object]) -> Callable[[], object]:
    """The same without its progress bars."""

    def run() -> object:
        with contextlib.redirect_stderr(io.StringIO()):
            return work()

    return run
