"""The shipped neutral texts, on which the cost of steering is measured."""

from __future__ import annotations

import json
from pathlib import Path

from steerkit.prompts.conversation import Conversation

__all__ = ["neutral_texts"]


def neutral_texts() -> list[Conversation]:
    """The shipped neutral texts: plain answered questions that no behaviour has a reason to change."""
    lines = Path(__file__).with_name("neutral.jsonl").read_text(encoding="utf-8").splitlines()
    return [Conversation(item["prompt"], answer=item["answer"]) for item in map(json.loads, lines)]
