"""System prompts that ask for a behaviour, and for its opposite: what steering is compared with.

Where a model has no place for them they stand in front of the first question, as plain text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from steerkit.errors import DataError
from steerkit.prompts.conversation import SIDES, Conversation, check_text, with_system
from steerkit.prompts.rendering import has_chat_template, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SystemPrompts", "instructed", "takes_system"]

_PROBE = "steerkit-system-probe"


@dataclass(frozen=True)
class SystemPrompts:
    """Wordings of both sides, in pairs: the n-th of one side is alike in length and form to the n-th of the other.

    Attributes:
        positive: each asks for the behaviour.
        negative: each asks for its opposite.

    Raises:
        DataError: a side is empty or holds a text twice or without a word in it, or the sides are not equally many.

    Example:
        >>> len(SystemPrompts(("Be glad.", "Sound happy."), ("Be sad.", "Sound gloomy.")))
        2
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def __post_init__(self) -> None:
        for side in SIDES:
            texts = tuple(getattr(self, side))
            object.__setattr__(self, side, texts)
            if not texts:
                raise DataError(f"{side} has no system prompt; give at least one wording, better three")
            for number, text in enumerate(texts, start=1):
                check_text(f"{side} {number}", text)
                if not text.strip():
                    raise DataError(f"{side} {number} is {text!r}; give a system prompt with words in it")
                if text in texts[: number - 1]:
                    raise DataError(f"{side} {number} stands there twice ({text[:40]!r}); give another wording")
        if len(self.positive) != len(self.negative):
            raise DataError(
                f"{len(self.positive)} positive and {len(self.negative)} negative system prompts; give as many of each"
            )

    def __len__(self) -> int:
        return len(self.positive)


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes system prompts; some templates refuse them or drop them silently.

    Args:
        tokenizer: the model's tokenizer.
    """
    if not has_chat_template(tokenizer):
        return False
    try:
        return _PROBE in render(tokenizer, Conversation("Hello", system=_PROBE)).text
    except DataError:
        return False


def instructed(conversation: Conversation, instruction: str, *, has_turn: bool) -> Conversation:
    """Put an instruction before a conversation, in front of the system prompt where it has one.

    Args:
        conversation: the conversation; its answer stays.
        instruction: what is asked of the model.
        has_turn: whether the model has system turns (see `takes_system`); without, and before a raw prompt, the
            instruction is plain text in front of the first question.
    """
    prompt = conversation.prompt
    if conversation.system is not None:
        return replace(conversation, system=f"{instruction}\n\n{conversation.system}")
    if isinstance(prompt, str):
        if has_turn and not conversation.raw:
            return with_system(conversation, instruction)
        return replace(conversation, prompt=f"{instruction}\n\n{prompt}")
    roles = [turn["role"] for turn in prompt]
    if has_turn and roles[0] != "system":
        return with_system(conversation, instruction)
    place = 0 if roles[0] == "system" or "user" not in roles else roles.index("user")
    turn = {**prompt[place], "content": f"{instruction}\n\n{prompt[place]['content']}"}
    return replace(conversation, prompt=(*prompt[:place], turn, *prompt[place + 1 :]))
