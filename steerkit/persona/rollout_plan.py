"""What a model is asked in its rollouts: every question under both system prompts of an instruction."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from steerkit.errors import DataError
from steerkit.persona.traits import TraitSpec
from steerkit.prompts.conversation import Conversation

__all__ = ["SIDES", "Asked", "RolloutPlan", "Side"]

Side = Literal["positive", "negative"]
SIDES: tuple[Side, Side] = ("positive", "negative")


@dataclass(frozen=True)
class RolloutPlan:
    """What is asked, and how it is answered.

    Attributes:
        samples: answers to each question under each system prompt; one is greedy, several are drawn at temperature 1.
        held_out_instructions: instructions that each held-out question is asked under, in turn.
        max_new_tokens: the longest answer, in tokens.
        seed: of all drawing.
        chat_template_kwargs: passed on to the chat template.
    """

    samples: int = 1
    held_out_instructions: int = 4
    max_new_tokens: int = 56
    seed: int = 0
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "held_out_instructions", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is at least 1, got {getattr(self, name)}")

    def asked(self, spec: TraitSpec) -> list[Asked]:
        """Every row there will be, in order: extraction first, those of one instruction together.

        Args:
            spec: of the trait.
        """
        count, first = len(spec.instructions), len(spec.extraction_questions)
        turns = min(self.held_out_instructions, count)
        return [
            Asked(is_held_out, question, instruction, sample)
            for is_held_out, questions in ((False, range(first)), (True, range(first, len(spec.questions))))
            for instruction in range(count)
            for question in questions
            for sample in range(self.samples)
            if not is_held_out or (instruction - question) % count < turns
        ]


class Asked(NamedTuple):
    """One thing that is asked of both assistants.

    Attributes:
        held_out: whether the question is one of the held-out half.
        question: its place among all questions, from 0.
        instruction: the instruction's place, from 0.
        sample: which of the samples.
    """

    held_out: bool
    question: int
    instruction: int
    sample: int

    def conversation(
        self, spec: TraitSpec, side: Side, *, answer: str | None = None, folded: bool = False
    ) -> Conversation:
        """What the model is given.

        Args:
            spec: of the trait.
            side: under which system prompt.
            answer: what the assistant says, where there is an answer.
            folded: write the system prompt before the question, because there is no system turn.
        """
        question, system = spec.questions[self.question], spec.system_prompt(self.instruction, side)
        if folded:
            return Conversation(f"{system}\n\n{question}", answer=answer)
        return Conversation(question, answer=answer, system=system)

    def seed(self, side: Side, seed: int) -> int:
        """The seed of one answer: its own, whatever else is asked."""
        text = f"{seed} {side} {self.question} {self.instruction} {self.sample}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
