"""Pairs of prompts for patching: a clean one and a corrupt one of equally many tokens, and what is measured of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerkit.errors import DataError
from steerkit.prompts.batching import Batch, batches, pad_token_id
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, render

if TYPE_CHECKING:
    from steerkit.evaluate.attribution.patching import Metric, Way

__all__ = ["PromptPairs", "logit_difference"]

WAYS = ("denoising", "noising")


@dataclass(frozen=True, eq=False)
class PromptPairs:
    """Pairs of prompts, token by token alike but for some that were replaced.

    Attributes:
        clean: prompts that show the behaviour.
        corrupt: the same with tokens replaced, row by row of equal length.
        pad_id: what shorter prompts are padded with.
        batch_size: pairs per pass.
    """

    clean: tuple[Rendered, ...]
    corrupt: tuple[Rendered, ...]
    pad_id: int
    batch_size: int

    @classmethod
    def of(cls, tokenizer: Any, clean: Sequence[Any], corrupt: Sequence[Any], *, batch_size: int = 16) -> PromptPairs:
        """Render pairs of prompts.

        Args:
            tokenizer: the model's.
            clean: prompts or conversations without answers.
            corrupt: as many, each with as many tokens as the clean one beside it.
            batch_size: pairs per pass.

        Raises:
            DataError: a side has more prompts than the other or none, or the prompts of a pair differ in length.
        """
        sides = [[render(tokenizer, Conversation.of(item)) for item in side] for side in (clean, corrupt)]
        if len(clean) != len(corrupt) or not clean:
            raise DataError(f"patching: {len(clean)} clean and {len(corrupt)} corrupt prompts; give pairs")
        for number, (one, other) in enumerate(zip(*sides, strict=True)):
            if len(one.ids) != len(other.ids):
                raise DataError(
                    f"patching: the prompts of pair {number} have {len(one.ids)} and {len(other.ids)} tokens; replace "
                    "words by others of as many tokens, because position is put in the place of position"
                )
        return cls(tuple(sides[0]), tuple(sides[1]), pad_token_id(tokenizer), batch_size)

    def batches(self, way: Way, positions: Sequence[int] | None = None) -> Iterator[tuple[Batch, Batch]]:
        """The base and the source of each batch, the same pairs in the same order, padded at the left.

        Args:
            way: `denoising` patches the clean prompt into the corrupt one, `noising` the other way round.
            positions: tokens counted from the end that every prompt has to have.

        Raises:
            DataError: no such way, or a prompt is shorter.
        """
        if way not in WAYS:
            raise DataError(f"patching: way {way!r}; give one of {', '.join(WAYS)}")
        shortest = min(len(one.ids) for one in self.clean)
        if wrong := [one for one in positions or () if not -shortest <= one < 0]:
            raise DataError(f"patching: position {wrong[0]}; count from the end, from -1 to -{shortest}")
        sides = (self.corrupt, self.clean) if way == "denoising" else (self.clean, self.corrupt)
        work = [batches(side, self.batch_size, pad_id=self.pad_id, side="left") for side in sides]
        return zip(*work, strict=True)

    def in_order(self, found: Sequence[Tensor]) -> Tensor:
        """What was found of the batches, [b, ...] each, as [n, ...] in the order of the pairs.

        Args:
            found: one for each batch.
        """
        work = batches(self.clean, self.batch_size, pad_id=self.pad_id, side="left")
        order = torch.tensor([row for batch in work for row in batch.rows], dtype=torch.long)
        return torch.cat(list(found))[order.argsort()]


def logit_difference(tokenizer: Any, right: Sequence[str], wrong: Sequence[str]) -> Metric:
    """How much larger the logit of one token is than that of another, behind each prompt.

    A probability would miss parts of the network that work against the behaviour, and a share of right answers most.

    Args:
        tokenizer: the model's.
        right: for each pair the answer to the clean prompt; its first token counts.
        wrong: for each pair the answer to the corrupt prompt.

    Returns:
        A metric [b] of logits [b, v].

    Raises:
        DataError: not as many of both, an answer without a token, or both begin with the same one.
    """
    sides = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in side] for side in (right, wrong)]
    if len(right) != len(wrong) or not all(ids for side in sides for ids in side):
        raise DataError(f"logit_difference: {len(right)} right and {len(wrong)} wrong answers; give pairs, none empty")
    plus, minus = (torch.tensor([ids[0] for ids in side], dtype=torch.long) for side in sides)
    if same := (plus == minus).nonzero()[:, 0].tolist():
        raise DataError(
            f"logit_difference: {right[same[0]]!r} and {wrong[same[0]]!r} of pair {same[0]} begin with the same token"
        )

    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        first, second = (ids.to(logits.device)[rows][:, None] for ids in (plus, minus))
        return (logits.gather(-1, first) - logits.gather(-1, second))[:, 0]

    return metric
