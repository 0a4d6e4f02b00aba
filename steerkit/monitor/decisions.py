"""`explain`: what a gate would decide about prompts, and why, without generating a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from steerkit.activations.recording import record
from steerkit.errors import UnknownNameError
from steerkit.methods._protocols import TiedToWeights
from steerkit.methods._registry import method_of
from steerkit.network.decoder import find_decoder
from steerkit.prompts.conversation import Conversation
from steerkit.steering.when_gates import gate_of
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["explain"]


def explain(
    model: nn.Module,
    tokenizer: Any,
    prompts: str | Conversation | Sequence[Any],
    vector: SteeringVector,
    *,
    strength: float | None = None,
    raw: bool = False,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Say what a gated vector decides about prompts.

    Args:
        model: the model the vector was fitted on, unsteered.
        tokenizer: its tokenizer.
        prompts: one prompt, or a list of strings, conversations and lists of messages.
        vector: a vector of a gated method, or one with `when`.
        strength: at which it would steer; None takes the vector's own, else the suggested one, else 1.
        raw: leave strings as they are, without the chat template.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.

    Returns:
        Per prompt whether the gate is open and what decided: for `controller` the gain, the weight and the step of each
        block, and the scores of network and probe; for `conditional` each condition's score and threshold; for `when`
        the rule and its readings.

    Raises:
        UnknownNameError: the vector has no gate, or one that tokens decide.
        VectorMismatchError: the vector was fitted on another model.
    """
    listed = [prompts] if isinstance(prompts, str | Conversation) else list(prompts)
    method = method_of(vector)
    vector.check(model, tokenizer)
    if isinstance(method, TiedToWeights):
        method.check_model(vector, find_decoder(model))
    editor = gate_of(model, vector, method, vector.sites, tokenizer)
    if editor is None:
        raise UnknownNameError(f"{vector.method}: this method has no gate, it steers every row; nothing to explain")
    if vector.when is not None and vector.when.per_token:
        raise UnknownNameError(f"when({vector.when}): tokens decide, and no prompt does; nothing to explain")
    given = strength if strength is not None else vector.strength
    if given is None:
        given = vector.suggested_strength
    if isinstance(given, tuple):
        raise UnknownNameError("explain: the vector has a strength per row; give one number")
    read = record(
        model,
        tokenizer,
        [Conversation.of(prompt, raw=raw) for prompt in listed],
        editor.reads,
        readout="prompt_last" if vector.when is not None else vector.readout or "last",
        batch_size=batch_size,
        chat_template_kwargs=chat_template_kwargs,
    )
    with torch.no_grad():
        found = editor.explain(read.positive, 1.0 if given is None else float(given))
    return [{"prompt": _text(prompt), **facts} for prompt, facts in zip(listed, found, strict=True)]


def _text(prompt: Any) -> Any:
    """A prompt as it was given, where JSON can hold it."""
    if isinstance(prompt, Conversation):
        return prompt.prompt if isinstance(prompt.prompt, str) else [dict(turn) for turn in prompt.prompt]
    return prompt
