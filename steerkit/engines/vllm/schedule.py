"""`Schedule`: from a request's vectors and a token's position to whether each writes the token, and how strongly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steerkit.engines.vllm.plan import TermPlan, span
from steerkit.maths.rank_two import READS, TURNS, features, leads
from steerkit.tokens.fade import SHAPES, Fade

__all__ = ["Schedule"]

_BEGIN, _END, _NEUTRAL = range(3)
_START, _STOP, _LAST, _SHAPE, _OVER = range(5)
_CONSTANT = len(SHAPES)


class Schedule:
    """What is known of each row's terms.

    Args:
        terms: of one request.
        rows: steered requests at one time.
        device: of the model.
    """

    def __init__(self, terms: int, rows: int, device: torch.device) -> None:
        self._strengths = torch.full((3, terms, rows + 1), math.nan, dtype=torch.float64, device=device)
        self._counts = torch.zeros(5, terms, rows + 1, dtype=torch.long, device=device)
        shape = (terms, rows + 1, 2, len(READS), len(TURNS))
        self._weights = torch.zeros(shape, dtype=torch.float32, device=device)
        self._leads = torch.zeros(terms, rows + 1, 7, dtype=torch.float32, device=device)
        self._fades = False

    def begin(self, row: int, plans: Sequence[TermPlan], prompt: int) -> None:
        """Take a request in.

        Args:
            row: that it gets.
            plans: of its vectors.
            prompt: tokens of its prompt.
        """
        strengths, counts = [], []
        for plan in plans:
            fade = plan.fade
            self._fades |= fade is not None
            neutral = math.nan if plan.neutral is None else plan.neutral
            strengths.append((plan.strength, plan.strength if fade is None else fade.to, neutral))
            shape, over = (_CONSTANT, 1) if fade is None else (SHAPES.index(fade.shape), fade.over)
            is_neutral = fade is None and plan.strength == plan.neutral
            counts.append((*((0, 0) if is_neutral else span(plan.scope, prompt)), prompt - 1, shape, over))
        device = self._counts.device
        for term, plan in enumerate(plans):
            weights = next(iter(plan.edits.values())).weights
            lead = leads(weights, features(torch.tensor(plan.strength, dtype=torch.float64, device=weights.device)))
            self._weights[term, row].copy_(weights, non_blocking=True)
            self._leads[term, row].copy_(lead, non_blocking=True)
        self._counts[:, :, row] = 0
        begun = torch.tensor(strengths, dtype=torch.float64), torch.tensor(counts, dtype=torch.long)
        # Copied without waiting for what the device still has to do.
        self._strengths[:, : len(plans), row] = begun[0].to(device, non_blocking=True).T
        self._counts[:, : len(plans), row] = begun[1].to(device, non_blocking=True).T

    def fill(self, on: Tensor, lead: Tensor, row: Tensor, positions: Tensor) -> None:
        """Say for each token and term whether and how strongly it is written.

        Args:
            on: [terms, n] bool, to be filled.
            lead: [terms, n, 7] float32, to be filled (`steerkit.maths.rank_two.leads`).
            row: [n] of each token.
            positions: [n] of each token in its request, counted from 0.
        """
        counts, place = self._counts[:, :, row], positions[None].long()
        inside = (place >= counts[_START]) & (place < counts[_STOP])
        if not self._fades:
            on.copy_(inside)
            lead.copy_(self._leads[:, row])
            return
        strengths = self._strengths[:, :, row]
        steps = (place - counts[_LAST]).clamp_min(0)
        share = torch.ones_like(strengths[_BEGIN])
        for number, shape in enumerate(SHAPES):
            share = torch.where(counts[_SHAPE] == number, _share(shape, steps, counts[_OVER]), share)
        strength = strengths[_END] + (strengths[_BEGIN] - strengths[_END]) * share
        on.copy_(inside & (strength != strengths[_NEUTRAL]))
        lead.copy_(leads(self._weights[:, row], features(torch.nan_to_num(strength))))


def _share(shape: str, steps: Tensor, over: Tensor) -> Tensor:
    """`Fade.share` with a length for each token."""
    return Fade(shape, 1).share(steps.double() / over.clamp_min(1)).double()
