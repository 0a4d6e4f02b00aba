"""How texts are to be rendered for a vector: prompt and answer joined as they were when it was fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steerkit.prompts.rendering import ANSWER_SEPARATOR, has_chat_template
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["as_fitted"]


def as_fitted(
    vectors: Sequence[SteeringVector], tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """The options of rendering with the separator that the first of some vectors was fitted with.

    A vector of a model without a chat template that says none was fitted when there was none.

    Args:
        vectors: what will be applied or read.
        tokenizer: the model's tokenizer.
        chat_template_kwargs: the options given; a separator among them stays.

    Returns:
        The options; those given where there is a chat template or no vector.
    """
    if not vectors or has_chat_template(tokenizer) or ANSWER_SEPARATOR in (chat_template_kwargs or {}):
        return chat_template_kwargs
    return {**(chat_template_kwargs or {}), ANSWER_SEPARATOR: vectors[0].answer_separator or ""}
