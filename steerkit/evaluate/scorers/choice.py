"""CAA's A/B metric: how likely the model picks the positive answer where it is offered both by letter.

    p_match = P(letter of the positive answer) / (P(A) + P(B))        at the position after "(", averaged over items

Rimsky, Gabrieli, Schulz, Tong, Hubinger, Turner (2024), "Steering Llama 2 via Contrastive Activation Addition",
arXiv 2312.06681.

Each pair of answers becomes one question: the item's prompt, then both answers as (A) and (B); the answer is made to
begin with "(". Items with an even number have the positive answer at (A), the others at (B), so that a liking for one
letter cancels out. The ids of the letters are those that the tokenizer gives them in this very text. Where it joins "("
with a letter into one token, the first tokens in which "(A" and "(B" differ are compared, behind what they share.

Where this file departs. The paper's items are written as questions of this form; here any pair of answers is. Without a
chat template (or for a raw prompt) a line "Answer:" ends the question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.errors import DataError
from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.scorers._forks import Fork, fork, fork_logits
from steerkit.evaluate.setup import Setup, shared_system
from steerkit.evaluate.trial import Trial
from steerkit.prompts.conversation import Conversation, Message
from steerkit.prompts.rendering import has_chat_template

__all__ = ["Choice"]


@dataclass(frozen=True)
class Choice(Scorer):
    """Probability of the positive answer's letter in a question with two choices."""

    name: ClassVar[str] = "choice"
    title: ClassVar[str] = "how likely the positive answer is picked where both are offered as (A) and (B)"
    source: ClassVar[str] = "Rimsky et al. 2024, arXiv 2312.06681"
    by_item: ClassVar[bool] = True
    of_pairs: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, Column]] = {
        "p_match": Column("picks the positive answer", "share", "higher", share=False, steered=True),
    }

    def score(self, trial: Trial) -> dict[str, Tensor]:
        """Score every pair.

        Args:
            trial: needs data with both answers to each prompt.

        Returns:
            ``{"p_match": [n]}``, float32

        Raises:
            DataError: a pair lacks an answer or has two prompts, a chat has no user turn, or the tokenizer does not
                tell the letters apart.
        """
        setup = trial.setup
        pairs, data = setup.pairs, setup.data  # `pairs` refuses what has no two answers to one prompt
        assert data is not None
        sides = zip(data.positive, data.negative, range(len(pairs)), strict=True)
        forks = [_question(setup, positive, negative, number) for positive, negative, number in sides]
        logits = fork_logits(trial, forks)
        # P(A) / (P(A) + P(B)) is the logistic function of the difference of the log-probabilities.
        first = torch.sigmoid(logits[:, 0] - logits[:, 1])
        is_first = torch.arange(len(forks)) % 2 == 0
        return {"p_match": torch.where(is_first, first, 1 - first)}


def _question(setup: Setup, positive: Conversation, negative: Conversation, number: int) -> Fork:
    """One item as a question with two choices, at the letters."""
    answers = [str(side.answer).strip() for side in (positive, negative)]
    if number % 2:
        answers.reverse()
    choices = "\n\nChoices:\n (A) {}\n (B) {}".format(*answers)
    is_plain = positive.raw or not has_chat_template(setup.tokenizer)
    prompt = _with_choices(positive.prompt, choices, is_plain, number)
    first, second = (
        setup.render(Conversation(prompt, answer=letter, system=shared_system(positive, negative), raw=positive.raw))
        for letter in ("(A", "(B")
    )
    found = fork(first, second)
    if found is None:
        raise DataError(f"item {number}: the tokenizer writes '(A' and '(B' alike, so no choice can be read off")
    return found


def _with_choices(
    prompt: str | tuple[Message, ...], choices: str, is_plain: bool, number: int
) -> str | tuple[Message, ...]:
    """The prompt with the choices behind its question."""
    if isinstance(prompt, str):
        return f"{prompt}{choices}\n\nAnswer:\n" if is_plain else prompt + choices
    asked = [place for place, turn in enumerate(prompt) if turn["role"] == "user"]
    if not asked:
        raise DataError(f"item {number}: the chat has no user turn to write the choices into; give one")
    turns = [dict(turn) for turn in prompt]
    turns[asked[-1]]["content"] += choices
    return tuple(turns)
