"""A compiled forward pass, and the seconds of generation."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steerkit.checks.doctor.case import Case, Given
from steerkit.network.decoder import execution_device

__all__ = ["compiled_model", "seconds"]

TIMED = 6
"""Tokens generated where it is timed."""


def compiled_model(case: Case) -> tuple[Callable[[], Tensor], list[int]]:
    """One compiled pass over the second text, and a list that grows with each graph.

    Args:
        case: the model.

    Returns:
        What runs the pass and gives logits [t, v], and the list.
    """
    import torch._dynamo

    graphs: list[int] = []

    def backend(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(1)
        return torch._dynamo.lookup_backend("inductor")(graph, inputs, **options) if case.compiled else graph.forward

    torch._dynamo.reset()
    compiled: Any = torch.compile(case.model, fullgraph=True, backend=backend)
    row, _ = case.row(case.texts[1].ids)

    def run() -> Tensor:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dynamo's, of the model's own code
            logits: Tensor = compiled(input_ids=row, use_cache=False).logits
            return logits[0]

    return run, graphs


def seconds(case: Case, strength: Given) -> float:
    """How long it takes to generate, planning and attaching not counted.

    Args:
        case: the model.
        strength: None for the unsteered model.
    """
    device = execution_device(case.decoder)
    with case.steered(strength):
        _finish(device)
        start = time.perf_counter()
        case.generate(None, max_new_tokens=TIMED, min_new_tokens=TIMED)
        _finish(device)
        return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
