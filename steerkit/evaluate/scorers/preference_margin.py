"""Preference margin: how much more likely the model finds the positive answer than the negative one, per token.

    margin(item) = mean over tokens of log p(positive answer | prompt)  -  the same of the negative answer

Teacher-forced under steering. Means per token, so that longer answers do not count for more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.activations import position_inputs
from steerkit.data import ContrastSet, Conversation, Rendered, batches, pad_token_id, render
from steerkit.errors import DataError
from steerkit.sites import execution_device, find_decoder
from steerkit.steering import steer
from steerkit.vector import SteeringVector

__all__ = ["answer_log_probs", "preference_margin"]


def preference_margin(
    model: nn.Module,
    tokenizer: Any,
    data: ContrastSet,
    *,
    vector: SteeringVector | Sequence[SteeringVector] | None = None,
    strength: float | None = None,
    scope: str | None = None,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Score every item of a contrast set.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        data: pairs with both answers; a contrast in the system prompt is left out, so that only steering tells.
        vector: what to steer with; None scores the bare model.
        strength: one number; None takes the file's suggested strength, else 1.
        scope: which tokens are written; None takes the vector's own.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.

    Returns:
        [n] float32, nats per token.

    Raises:
        DataError: the set is not paired, or a pair lacks an answer or has two prompts.
    """
    items: list[Conversation] = []
    for number, (positive, negative) in enumerate(zip(data.positive, data.negative, strict=False)):
        if not data.paired or positive.answer is None or negative.answer is None or positive.prompt != negative.prompt:
            raise DataError(f"preference margin: item {number} has no two answers to one prompt; give both answers")
        items += [Conversation(side.prompt, answer=side.answer, raw=side.raw) for side in (positive, negative)]
    rendered = [render(tokenizer, item, chat_template_kwargs=chat_template_kwargs) for item in items]
    scores = answer_log_probs(
        model,
        rendered,
        pad_id=pad_token_id(tokenizer),
        vector=vector,
        strength=strength,
        scope=scope,
        batch_size=batch_size,
    )
    return scores[0::2] - scores[1::2]


def answer_log_probs(
    model: nn.Module,
    rendered: Sequence[Rendered],
    *,
    pad_id: int,
    vector: SteeringVector | Sequence[SteeringVector] | None = None,
    strength: float | None = None,
    scope: str | None = None,
    batch_size: int = 16,
) -> Tensor:
    """Mean log-probability per answer token of each text, teacher-forced under steering.

    Args:
        model: any decoder-only transformers model.
        rendered: texts with answers.
        pad_id: fills the rows; masked.
        vector: what to steer with; None scores the bare model.
        strength: one number.
        scope: which tokens are written.
        batch_size: rows per pass.

    Returns:
        [n] float32, nats per token.
    """
    decoder = find_decoder(model)
    device = execution_device(decoder)
    scores = torch.empty(len(rendered))
    # Padded at the left, so that all answers end in the last column and the LM head runs on those columns only.
    for batch in batches(rendered, batch_size, pad_id=pad_id, side="left"):
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        answers = [len(rendered[row].ids) - rendered[row].prompt_length for row in batch.rows]
        keep = max(answers) + 1
        positions = position_inputs(decoder.model, mask)
        context: Any = (
            contextlib.nullcontext()
            if vector is None
            else steer(model, vector, strength, scope=scope, prompt_lengths=batch.prompt_lengths)
        )
        with context, torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep, **positions
            ).logits[:, -keep:-1]
        targets = ids[:, -(keep - 1) :].to(logits.device)
        chosen = torch.log_softmax(logits.float(), dim=-1).gather(-1, targets[..., None])[..., 0]
        for place, row in enumerate(batch.rows):
            scores[row] = chosen[place, -answers[place] :].mean()
    return scores
