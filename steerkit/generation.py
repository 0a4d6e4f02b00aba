"""Prompts to texts: chat template, left padding, seeds, and steering where a vector is given."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from steerkit.data import Conversation, Message, batches, pad_token_id, render
from steerkit.errors import DataError, StrengthError
from steerkit.roles import Roles
from steerkit.sites import execution_device, find_decoder
from steerkit.steering import Strength, steer, strength_value, vectors_of
from steerkit.tokens import Scope
from steerkit.vector import SteeringVector

__all__ = ["generate"]


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Message] | Conversation],
    *,
    vector: SteeringVector | Sequence[SteeringVector] | None = None,
    strength: Strength | None = None,
    scope: str | None = None,
    unit: Literal["paper", "norm"] | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    seed: int | None = None,
    raw: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[str]:
    """Answer prompts, steered where a vector is given. Greedy unless `do_sample=True`.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer; never changed.
        prompts: strings (user turns where there is a chat template), chats, or conversations. A chat that ends with an
            assistant turn is continued.
        vector: one vector or several.
        strength: one number, or one per prompt; None takes each file's suggested strength, else 1.
        scope: which tokens are written; None takes each vector's own.
        unit: `paper` or `norm`; None takes each vector's own.
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts per pass.
        seed: fixes sampling without touching the caller's random state.
        raw: leave strings as they are, without the chat template.
        chat_template_kwargs: passed on to the chat template.
        options: handed on to `transformers`' own `generate` (`num_return_sequences`, `do_sample`, ...).

    Returns:
        The texts without their prompts, in the order given (`num_return_sequences` of each in a row).

    Raises:
        DataError: no prompts, or one string instead of a list of them.
        StrengthError: one strength per prompt was given, but not as many as prompts.
        SteerError: a prompt cannot be rendered (see `steerkit.data.render`), or the model not steered (see `steer`).
    """
    if isinstance(prompts, str):
        raise DataError("generate: got one string; give a list of prompts")
    prompts = list(prompts)
    if not prompts:
        raise DataError("generate: got no prompts; give at least one")
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens is at least 1, got {max_new_tokens}")
    rows = _rows(strength, len(prompts))
    vectors = [] if vector is None else vectors_of(vector)
    for one in vectors:
        one.check_template(tokenizer)
        _rows(one.strength, len(prompts))
    if scope is not None:
        Scope.parse(scope)
    roles = Roles(tokenizer)
    rendered = [
        render(
            tokenizer,
            Conversation.of(prompt, raw=raw and isinstance(prompt, str)),
            chat_template_kwargs=chat_template_kwargs,
        )
        for prompt in prompts
    ]
    device = execution_device(find_decoder(model))
    pad = pad_token_id(tokenizer)
    settings: dict[str, Any] = {"pad_token_id": pad, "max_new_tokens": max_new_tokens, **options}
    if "generation_config" not in settings:
        settings.setdefault("do_sample", False)
    if settings.get("do_sample") is False:
        # A checkpoint's sampling defaults would only draw warnings here.
        settings = {"temperature": None, "top_p": None, "top_k": None, **settings}
    texts: list[list[str]] = [[] for _ in prompts]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()), enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for batch in batches(rendered, batch_size, pad_id=pad, side="left"):
            ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            own = [rows[row] for row in batch.rows] if rows is not None else strength
            with torch.no_grad(), _steered(model, _of_batch(vectors, batch.rows), own, scope, unit, roles):
                out = model.generate(input_ids=ids, attention_mask=mask, **settings)  # type: ignore[operator]
            out = getattr(out, "sequences", out)
            answers = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            each = len(answers) // len(batch.rows)
            for place, row in enumerate(batch.rows):
                texts[row] = answers[place * each : (place + 1) * each]
    return [text for answers in texts for text in answers]


def _steered(
    model: nn.Module, vectors: Sequence[SteeringVector], strength: Any, scope: str | None, unit: Any, roles: Roles
) -> Any:
    if not vectors:
        return contextlib.nullcontext()
    return steer(model, vectors, strength, scope=scope, unit=unit, tokenizer=roles)


def _of_batch(vectors: Sequence[SteeringVector], rows: Sequence[int]) -> list[SteeringVector]:
    """The vectors with their own strengths per prompt, if they have such, in the order of a batch."""
    return [
        one.at(strength=[one.strength[row] for row in rows]) if isinstance(one.strength, tuple) else one
        for one in vectors
    ]


def _rows(strength: Strength | None, prompts: int) -> list[float] | None:
    """One strength per prompt, where that is what was given."""
    listed = None if strength is None else strength_value(strength)
    if not isinstance(listed, tuple):
        return None
    if len(listed) != prompts:
        raise StrengthError(f"strength: got {len(listed)} numbers for {prompts} prompts; give one, or one per prompt")
    return list(listed)
