"""Checks of batches and of `generate`: caches, pads, one strength per row, beams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from steerkit.checks._bitwise import largest_gap
from steerkit.checks.doctor.case import NEW, Case
from steerkit.checks.doctor.gaps import batch_gap, beside_plain, plain_of
from steerkit.checks.doctor.judging import judged_rows, worst_of

if TYPE_CHECKING:
    from steerkit.checks.doctor.case import Given

__all__ = ["PER_ROW", "beams", "cache", "pads", "rows"]

PER_ROW = (1.0, -0.7)


def cache(case: Case) -> str:
    """Greedy decoding of a left-padded batch, with and without a cache, equals one plain pass over what it produced.

    The plain pass has each row alone and without pads. Both being equal to it, the tokens can part only at a tie.
    """

    def measure(strength: Given) -> float:
        worst = 0.0
        for use_cache in (True, False):
            out = case.generate(strength, use_cache=use_cache, output_logits=True)
            worst = worst_of(worst, *(largest_gap(*pair) for pair in beside_plain(case, out, strength)))
        return worst

    return judged_rows(case, f"{NEW} tokens with and without a cache", measure, 1.0, may_lack=True)


def pads(case: Case) -> str:
    """A text in a batch padded at the left or the right gets the logits that it gets alone."""

    def measure(strength: Given) -> float:
        sides: tuple[Literal["left", "right"], ...] = ("left", "right")
        return worst_of(0.0, *(batch_gap(case, side, strength) for side in sides))

    return judged_rows(case, "pads at the left and the right", measure, 1.0)


def rows(case: Case) -> str:
    """With a strength for each row, a row in a padded batch gets what it gets alone with its own."""
    return judged_rows(case, "one strength per row", lambda strength: batch_gap(case, "left", strength), PER_ROW)


def beams(case: Case) -> str:
    """The scores of beam search, with a strength for each row, are those of a plain pass over each sequence."""

    def measure(strength: Given) -> float:
        out = case.generate(
            strength, num_beams=2, num_return_sequences=2, length_penalty=0.0, output_scores=True, use_cache=True
        )
        worst = 0.0
        for score, (answer, behind) in zip(out.sequences_scores, plain_of(case, out, strength), strict=True):
            chosen = torch.log_softmax(behind.float(), dim=-1).gather(-1, answer[:, None])
            # Log-probabilities near 0 have no size of their own; what rounding moves is the logits.
            size = behind.float().abs().max() * len(answer)
            worst = worst_of(worst, float((score.float() - chosen.sum()).abs() / size))
        return worst

    return judged_rows(case, "2 beams of 2 rows", measure, PER_ROW, may_lack=True)
