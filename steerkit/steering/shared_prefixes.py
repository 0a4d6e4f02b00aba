"""Blocks of a continuous-batching cache that outlive a steering context: dropped, or refused.

`generate_batch` with a persistent manager keeps the keys and values of prompts for later requests that begin alike,
whatever was steered, or changed in the weights, when they were made.
"""

from __future__ import annotations

import logging
from typing import Any, cast

from torch import nn

from steerkit.errors import ModelError
from steerkit.tokens.transformers_facts import batching_managers

__all__ = ["drop_shared_prefixes", "refuse_running_batches"]

logger = logging.getLogger(__name__)


def refuse_running_batches(model: nn.Module, what: str) -> None:
    """Refuse to change a model while a manager of `generate_batch` that shares prompt blocks runs on it.

    Args:
        model: the transformers model itself.
        what: what is about to change, for the message.

    Raises:
        ModelError: such a manager runs.
    """
    running, _ = batching_managers(model)
    if running is not None:
        raise ModelError(
            f"{what}: a manager of continuous batching runs on this model and shares prompt blocks between requests, "
            "so that steered and other answers would mix; stop it first, or make it with "
            "ContinuousBatchingConfig(allow_block_sharing=False)"
        )


def drop_shared_prefixes(model: nn.Module) -> None:
    """Destroy the manager of `generate_batch` that is kept on a model, and with it the blocks it would share.

    Args:
        model: the transformers model itself.
    """
    _, kept = batching_managers(model)
    if kept is not None:
        cast("Any", model).destroy_cached_continuous_batching_manager()
        logger.info("the kept manager of continuous batching was destroyed: its shared prompt blocks are out of date")
