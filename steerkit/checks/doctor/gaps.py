"""How far what was generated or batched is from plain passes over single rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from steerkit.checks._bitwise import largest_gap
from steerkit.checks.doctor.case import Case, Given
from steerkit.checks.doctor.judging import worst_of

__all__ = ["batch_gap", "beside_plain", "plain_of"]


def batch_gap(case: Case, side: Literal["left", "right"], strength: Given) -> float:
    """How far the texts in a padded batch are from each text alone.

    Args:
        case: the model.
        side: where the pads are.
        strength: None for the unsteered model.
    """
    ids, mask = case.rows(side)
    found = case.logits(ids, mask, strength, case.prompts)
    worst = 0.0
    for row, (text, prompt) in enumerate(zip(case.texts, case.prompts, strict=True)):
        expected = case.alone(text.ids, prompt, _of_row(strength, row))
        worst = worst_of(worst, largest_gap(found[row][mask[row].bool()], expected))
    return worst


def plain_of(case: Case, out: Any, strength: Given) -> list[tuple[Tensor, Tensor]]:
    """For every sequence that was generated its new ids [t], and the logits [t, v] behind them in a plain pass."""
    width, each = case.rows("left")[0].shape[1], len(out.sequences) // len(case.texts)
    found = []
    for place, sequence in enumerate(out.sequences):
        row, answer = place // each, sequence[width:]
        prompt = case.texts[row].ids
        logits = case.alone([*prompt, *answer.tolist()], len(prompt), _of_row(strength, row))
        found.append((answer, logits[len(prompt) - 1 : -1]))
    return found


def beside_plain(case: Case, out: Any, strength: Given) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row what `generate` saw and what a plain pass gives, both [t, v]."""
    stacked = torch.stack(out.logits, dim=1)
    for seen, (_, expected) in zip(stacked, plain_of(case, out, strength), strict=True):
        yield seen, expected


def _of_row(strength: Given, row: int) -> float | None:
    return strength if strength is None or isinstance(strength, int | float) else strength[row]
