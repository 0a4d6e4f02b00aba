"""Output score: does steering make the likely next token one of those that the vector's direction stands for?

    S_out = (1 - min over t in M of rank(t) / V) * max over t in M of p(t)

with M the 20 tokens that the model's head reads off the direction alone and p the next token behind a neutral
beginning, with the vector at its strength. Arad, Mueller, Belinkov (2025), arXiv 2505.20063, have one beginning, the
first one here, and one great strength; as a scorer it takes the strength that is measured, and a few beginnings, so
that there is an interval. `steerkit.evaluate.output_score` gives the published form, of many directions at once.

The unsteered model has no direction, so the column is the change against it, at the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.errors import DataError
from steerkit.evaluate.output_score import PREFIX, in_the_stream, lens_tokens, score_of
from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.trial import Answer, Trial
from steerkit.methods._registry import method_of
from steerkit.prompts.conversation import Conversation
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["OutputScore"]

_BEGINNINGS = (
    PREFIX,
    "In my opinion,",
    "Most people think that",
    "The best thing about it is",
    "When I was younger,",
    "It is well known that",
    "Yesterday I heard that",
    "What matters most is",
)


@dataclass(frozen=True)
class OutputScore(Scorer):
    """Change of the output score of the vector's direction, against the unsteered model."""

    name: ClassVar[str] = "output_score"
    title: ClassVar[str] = "whether steering brings the tokens that the direction stands for"
    source: ClassVar[str] = "Arad et al. 2025, arXiv 2505.20063"
    against_baseline: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, Column]] = {
        "output_score": Column("change of the output score", "probability", share=False),
    }

    def score(self, trial: Trial) -> dict[str, Tensor]:
        """Score every beginning.

        Args:
            trial: whose vector is scored.

        Returns:
            ``{"output_score": [n]}``; zeros for the unsteered model.

        Raises:
            DataError: the vector has no single direction that is added to the residual stream.
        """
        if trial.is_baseline:
            return {"output_score": torch.zeros(len(_BEGINNINGS), dtype=torch.float32)}
        setup = trial.setup
        tokens = lens_tokens(setup.model, setup.tokenizer, _direction(trial.vectors)[None])
        of = _AtTokens(tuple(tokens[0].tolist()))
        # What follows the beginning is not looked at; it is only what a next token is predicted for.
        texts = [setup.render(Conversation.of(text, answer=" it", raw=True)) for text in _BEGINNINGS]
        after, before = (torch.stack(one.over_answers(texts, of)) for one in (trial, trial.baseline))
        return {"output_score": after - before}


@dataclass(frozen=True)
class _AtTokens:
    """The score of the first token that is predicted: [] on the CPU."""

    ids: tuple[int, ...]

    def __call__(self, answer: Answer) -> Tensor:
        probabilities = torch.softmax(answer.logits[:1], dim=-1)
        return score_of(probabilities, torch.tensor([self.ids], device=probabilities.device, dtype=torch.long))[0].cpu()


def _direction(vectors: Sequence[SteeringVector]) -> Tensor:
    """[d] of the first site that has one and is added to the stream."""
    for vector in vectors:
        method = method_of(vector)
        for site in vector.sites:
            found = method.direction(vector.params(site)) if in_the_stream(site) else None
            if found is not None and bool(found.any()):
                return found.float()
    raise DataError("output_score: the vector has no single direction in the residual stream; leave this scorer out")
