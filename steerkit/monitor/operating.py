"""`operating_points`: a gated vector at other operating points, each with what it promises and how it held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from steerkit.activations.recording import record
from steerkit.errors import UnknownNameError
from steerkit.fitting.held_out import figures
from steerkit.methods._protocols import SetsOperatingPoint, TiedToWeights
from steerkit.methods._registry import method_of
from steerkit.network.decoder import find_decoder
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Prompt
from steerkit.vector.fitted_rendering import as_fitted
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["operating_points"]


def operating_points(
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    ordinary: Sequence[Prompt],
    held_out: ContrastSet,
    shares: Sequence[float] = (0.05,),
    *,
    confidence: float = 0.95,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[SteeringVector]:
    """Let a gate open so seldom that at most a share of ordinary prompts opens it.

    Args:
        model: the model the vector was fitted on, unsteered.
        tokenizer: its tokenizer.
        vector: a vector of a gated method.
        ordinary: prompts that should not open the gate, of the kind that will be asked; neither fitted on nor chosen by
            how the gate judges them. 59 or more for 5 % with 95 % confidence.
        held_out: other prompts of both sides, on which is counted how often the gate opens.
        shares: of ordinary prompts that may open the gate, at most.
        confidence: of that promise.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.

    Returns:
        For each share the vector that keeps it, as open as possible. ``extra["gate"]`` says what is promised and on how
        many prompts it rests, ``held_out["gate"]["opened"]`` how many held-out prompts opened it, kind by kind.

    Raises:
        UnknownNameError: the vector's method has no operating point.
        VectorMismatchError: the vector was fitted on another model.
        FitError: there are too few ordinary prompts to promise so much, or a share is none.
    """
    method = method_of(vector)
    if not isinstance(method, SetsOperatingPoint):
        raise UnknownNameError(f"{vector.method}: this method has no gate, so it has no operating point")
    vector.check(model, tokenizer)
    if isinstance(method, TiedToWeights):
        method.check_model(vector, find_decoder(model))
    common: dict[str, Any] = {
        "readout": vector.readout or "last",
        "batch_size": batch_size,
        "chat_template_kwargs": as_fitted([vector], tokenizer, chat_template_kwargs),
    }
    calibration = record(model, tokenizer, list(ordinary), vector.reads, **common).positive
    asked = record(model, tokenizer, held_out, vector.reads, **common)
    found = []
    for share in shares:
        promise = {"max_false_alarm": float(share), "confidence": float(confidence)}
        moved = type(method).from_settings({**vector.settings, **promise}).calibrated(vector, calibration)
        found.append(moved.with_held_out(figures(moved, held_out, asked)))
    return found
