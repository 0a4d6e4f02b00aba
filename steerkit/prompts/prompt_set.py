"""`PromptSet`: prompts without sides, for methods that look for directions nobody has named."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from steerkit.errors import DataError
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation, Prompt
from steerkit.prompts.files.rows import item_at

__all__ = ["PromptSet"]


@dataclass(frozen=True)
class PromptSet:
    """Prompts, each once, none of which shows or lacks a behaviour.

    Attributes:
        prompts: conversations without answers, in the order in which they were given first.
        source: the name of where they came from; not part of the digest.

    Raises:
        DataError: there is no prompt.
    """

    prompts: tuple[Conversation, ...]
    source: str = ""

    def __post_init__(self) -> None:
        once: list[Conversation] = []
        for item in self.prompts:  # a chat has no hash
            prompt = replace(item, answer=None)
            if prompt not in once:
                once.append(prompt)
        if not once:
            raise DataError("there is no prompt; give at least one")
        object.__setattr__(self, "prompts", tuple(once))

    @classmethod
    def of(cls, data: ContrastSet | PromptSet | Sequence[Prompt]) -> PromptSet:
        """The prompts of a list, or of both sides of a contrast set.

        Args:
            data: strings, lists of messages or conversations; of a contrast set the answers are left out.

        Raises:
            DataError: there is no prompt, `data` is one string, or an item is no prompt.

        Example:
            >>> len(PromptSet.of(["How was your day?", "How was your day?", "What is the sea?"]).prompts)
            2
        """
        if isinstance(data, PromptSet):
            return data
        if isinstance(data, ContrastSet):
            return cls((*data.positive, *data.negative), data.source)
        if isinstance(data, str | Mapping) or not isinstance(data, Iterable):
            raise DataError(f"prompts: expected a list of prompts, got {reprlib.repr(data)}; put it into a list")
        prompts = []
        for index, item in enumerate(data):
            with item_at(f"prompt {index}"):
                prompts.append(Conversation.of(item))
        return cls(tuple(prompts))

    @property
    def digest(self) -> str:
        """The sha256, in hex, of every text, role and flag that is fitted on; any character changes it."""
        content = [[item.prompt, item.system, item.raw] for item in self.prompts]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
