"""Two answers to one prompt at the token where they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from steerkit.errors import DataError
from steerkit.evaluate.trial import Answer, Trial
from steerkit.prompts.rendering import Rendered

__all__ = ["Fork", "fork", "fork_logits"]


class Fork(NamedTuple):
    """The place at which two answers to one prompt differ first.

    Attributes:
        text: one of both, cut behind its first token of its own.
        ids: that token in the first answer, and in the second.
    """

    text: Rendered
    ids: tuple[int, int]


def fork(first: Rendered, second: Rendered) -> Fork | None:
    """Find where two answers to one prompt part.

    Args:
        first: the prompt with one answer.
        second: the same prompt with another.

    Returns:
        The fork; None where one answer is the other one, or its beginning.

    Raises:
        DataError: they differ before the answer begins.
    """
    pairs = zip(first.ids, second.ids, strict=False)
    place = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    if place is None:
        return None
    # Where a tokenizer joins the prompt's end with one of the answers, that answer begins a token earlier.
    shown = first if first.prompt_length <= second.prompt_length else second
    if place < shown.prompt_length:
        raise DataError(
            f"{first.text[-40:]!r} and {second.text[-40:]!r} differ in token {place}, before the answer begins; "
            "give both the same prompt"
        )
    cut = replace(shown, ids=shown.ids[: place + 1], offsets=shown.offsets[: place + 1])
    return Fork(cut, (first.ids[place], second.ids[place]))


def fork_logits(trial: Trial, forks: Sequence[Fork]) -> Tensor:
    """Logits of both tokens of each fork, given all that stands before it.

    Args:
        trial: steered or the baseline.
        forks: where answers part.

    Returns:
        [n, 2] float32 on the CPU.
    """
    if not forks:
        return torch.empty(0, 2, dtype=torch.float32)
    at_forks = _AtForks(tuple(one.ids for one in forks))
    return torch.stack(trial.over_answers([one.text for one in forks], at_forks))


@dataclass(frozen=True)
class _AtForks:
    """Picks the logits of both tokens of each fork: [2] on the CPU."""

    ids: tuple[tuple[int, int], ...]

    def __call__(self, answer: Answer) -> Tensor:
        return answer.logits[-1, list(self.ids[answer.row])].cpu()
