"""What AUSteer reads of a contrast set: pairs in a balance, and texts without a chat template."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from steerkit.errors import DataError

if TYPE_CHECKING:
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.prompts.conversation import Conversation

__all__ = ["as_it_stands", "balanced"]


def balanced(data: ContrastSet) -> ContrastSet:
    """Without the last of those pairs whose answers stand the other way round in fewer pairs.

    Args:
        data: pairs.
    """
    labels = [(one.answer, other.answer) for one, other in zip(data.positive, data.negative, strict=True)]
    counts, seen, kept = Counter(labels), Counter[Any](), []
    for place, (good, bad) in enumerate(labels):
        seen[good, bad] += 1
        if seen[good, bad] <= (counts[bad, good] or len(labels)):
            kept.append(place)
    if len(kept) == len(labels):
        return data
    return data.items_at(kept)


def as_it_stands(item: Conversation) -> Conversation:
    """A conversation without a chat template.

    Args:
        item: one prompt, perhaps with an answer.

    Raises:
        DataError: it has several messages, or a system prompt.
    """
    if not isinstance(item.prompt, str) or item.system is not None:
        raise DataError("austeer: without a template a prompt is one text; messages and system prompts need template")
    return replace(item, raw=True)
