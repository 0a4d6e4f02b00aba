"""What a measurement depends on, as one digest: figures are taken from a store only if nothing of it has changed."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import astuple
from typing import Any

import torch
import transformers

import steerkit
from steerkit.evaluate.setup import Setup
from steerkit.fitting.fitting import tokenizer_digest
from steerkit.model.weights import weights_digest
from steerkit.network.decoder import inner_model
from steerkit.prompts.rendering import ANSWER_SEPARATOR, answer_separator
from steerkit.vector.model_identity import model_facts

__all__ = ["digest_of", "environment", "setup_identity", "weights_digest"]


def environment() -> dict[str, str]:
    """Versions of what computes, as plain text."""
    return {
        "steerkit": steerkit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def setup_identity(setup: Setup) -> dict[str, Any]:
    """Collect everything that a score depends on, apart from the vector and the scorer.

    Args:
        setup: model, tokenizer and items.

    Returns:
        Plain data: weights, precision, revision, template, vocabulary, library versions, and every text.
    """
    model = inner_model(setup.model)
    separator = answer_separator(setup.tokenizer, setup.chat_template_kwargs)
    config: Any = getattr(model, "config", None)
    generation: Any = getattr(model, "generation_config", None)
    return {
        **model_facts(model, setup.tokenizer),
        "class": type(model).__name__,
        "config": digest_of(config.to_dict() if hasattr(config, "to_dict") else str(config)),
        "generation": digest_of(generation.to_dict() if generation is not None else None),
        "weights": weights_digest(model),
        "dtype": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "tokenizer_sha256": tokenizer_digest(setup.tokenizer),
        "chat_template_kwargs": dict(setup.chat_template_kwargs or {}),
        **({} if setup.system is None else {"system": setup.system}),
        **({} if separator is None else {ANSWER_SEPARATOR: separator}),
        "environment": environment(),
        "data": None if setup.data is None else setup.data.digest,
        "prompts": None if setup.prompts is None else [astuple(prompt) for prompt in setup.asked],
        "neutral": digest_of([astuple(text) for text in setup.calm]),
        "texts": setup.texts,
        "max_new_tokens": setup.max_new_tokens,
    }


def digest_of(content: Any) -> str:
    """The sha256, in hex, of plain data.

    Args:
        content: what JSON can hold; anything else counts by its text.
    """
    canonical = json.dumps(content, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
