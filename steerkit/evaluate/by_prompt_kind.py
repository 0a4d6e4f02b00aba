"""What a vector does to two kinds of prompts: refusals among the answers, and answers that stay as they were.

    refused   = share of answers that hold a refusing phrase at their beginning     (the scorer `refusal`)
    unchanged = share of answers that are word for word those of the unsteered model

For methods that decide by the prompt. One kind should be refused, the other left alone, so the kinds are never mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from steerkit.evaluate.intervals import Estimate, interval
from steerkit.evaluate.scorers.refusal import Refusal
from steerkit.evaluate.setup import Setup
from steerkit.methods._refusal import is_refusal
from steerkit.prompts.rendering import spread
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Kind", "by_kind"]


@dataclass(frozen=True)
class Kind:
    """One kind of prompts, answered without and with steering.

    Attributes:
        side: of the data.
        items: prompts of it.
        strength: at which it was answered.
        before: share of refusals of the unsteered model.
        refused: share of refusals under steering.
        unchanged: share of answers that stayed as they were.
    """

    side: Literal["positive", "negative"]
    items: int
    strength: float
    before: Estimate
    refused: Estimate
    unchanged: Estimate

    def as_json(self) -> dict[str, Any]:
        """Everything, shares as mean, low and high."""
        shares = {name: getattr(self, name) for name in ("before", "refused", "unchanged")}
        return {
            "side": self.side,
            "strength": self.strength,
            "items": self.items,
            **{name: [share.mean, share.low, share.high] for name, share in shares.items()},
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Kind:
        """Read what `as_json` gave.

        Args:
            plain: plain data.
        """
        shares = {name: Estimate(*plain[name]) for name in ("before", "refused", "unchanged")}
        return cls(plain["side"], plain["items"], plain["strength"], **shares)


def by_kind(
    setup: Setup, vector: SteeringVector, strength: float, *, step: Callable[[], None] | None = None
) -> tuple[Kind, Kind]:
    """Answer the prompts of both sides without and with a vector.

    Prompts are taken evenly over each side, as many as the setup answers.

    Args:
        setup: with data of two kinds of prompts.
        vector: what to steer with.
        strength: how strongly.
        step: called when a side has been answered.

    Returns:
        The positive side and the negative one; intervals are Wilson's at 95 %.

    Raises:
        DataError: there is no data.
    """
    found = []
    sides: tuple[Literal["positive"], Literal["negative"]] = ("positive", "negative")
    for side in sides:
        there = setup.side(side)
        there = replace(there, prompts=spread(there.prompts or (), setup.texts))
        baseline, steered = there.baseline.texts, there.trial(vector, strength).texts
        shares = (
            [_refuses(text) for text in baseline],
            [_refuses(text) for text in steered],
            [before == after for before, after in zip(baseline, steered, strict=True)],
        )
        found.append(Kind(side, len(baseline), strength, *(_share(values) for values in shares)))
        if step is not None:
            step()
    return found[0], found[1]


def _refuses(text: str) -> bool:
    return is_refusal(text, first=Refusal().first)


def _share(values: Sequence[bool]) -> Estimate:
    return interval(torch.tensor(values, dtype=torch.double), shares=True)
