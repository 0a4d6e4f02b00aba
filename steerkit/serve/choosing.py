"""From the logits of a pass to the next token of each of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from steerkit.serve.events import Token
from steerkit.serve.passes import Pass
from steerkit.serve.row import Row

__all__ = ["choose", "follow"]


def choose(rows: Sequence[Row], found: Pass) -> None:
    """Choose the next token of each row and hand it on; a row whose logits are not finite ends with an error.

    Args:
        rows: of the pass.
        found: what it gave.
    """
    logits, place = found.logits, {id(row): number for number, row in enumerate(rows)}
    picked = logits.argmax(dim=-1)
    for number, row in enumerate(rows):
        if row.leader is None and not row.sampler.is_greedy:
            picked[number] = row.sampler.draw(logits[number])
    # One look at the device for all rows.
    chosen, finite = torch.stack([picked, torch.isfinite(logits.amax(dim=-1)).long()]).tolist()
    followers = {id(row.leader): number for number, row in enumerate(rows) if row.leader is not None}
    readings = {probe: values.tolist() for probe, values in found.readings.items()}
    tokens = {}
    for number, row in enumerate(rows):
        if row.leader is not None:
            continue
        beside = followers.get(id(row))
        kl = 0.0 if row.ticket.request.kl else None
        if beside is not None:
            kl = _kl(logits[number], logits[beside])
        read = None if row.probe is None else readings[row.probe][number]
        tokens[number] = _token(row, chosen[number], logits[number], kl, read)
    for number, row in enumerate(rows):
        if not finite[number]:
            (row.leader or row).end("error", "the logits are not finite; give a smaller strength")
        else:
            row.take(tokens[number if row.leader is None else place[id(row.leader)]])
    follow(rows)


def follow(rows: Sequence[Row]) -> None:
    """End the rows that read along with one that has ended.

    Args:
        rows: all of a batch.
    """
    for row in rows:
        if row.leader is not None and row.leader.finish is not None:
            row.end(row.leader.finish)


def _token(row: Row, token: int, logits: Tensor, kl: float | None, read: float | None) -> Token:
    """A token with what its request wants to know of it; logits [v]."""
    asked = row.ticket.request.logprobs
    if asked is None:
        return Token(token, kl=kl, reading=read)
    known = log_softmax(logits, dim=-1)
    top = known.topk(min(asked, len(known))) if asked else None
    likeliest = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Token(token, float(known[token]), likeliest, kl, read)


def _kl(steered: Tensor, baseline: Tensor) -> float | None:
    """Nats from one distribution to another; logits [v] each. None where it is infinite."""
    one, other = log_softmax(steered, dim=-1), log_softmax(baseline, dim=-1)
    # A token that neither can choose is 0 times not-a-number.
    nats = float((one.exp() * (one - other)).nansum())
    return max(nats, 0.0) if math.isfinite(nats) else None
