"""Dose-response: the preference margin over strengths, with its interval and random directions beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from steerkit.data import ContrastSet
from steerkit.directions import random_direction
from steerkit.evaluate.intervals import Estimate, bootstrap
from steerkit.evaluate.scorers.preference_margin import preference_margin
from steerkit.vector import SteeringVector

__all__ = ["Curve", "dose_response", "random_like"]


@dataclass(frozen=True)
class Curve:
    """A dose-response curve.

    Attributes:
        strengths: in the vector's unit.
        margins: at each strength, the mean over items with its 95 % interval, in nats per token.
        controls: for each random direction the mean margin at every strength.
        items: number of held-out items.
    """

    strengths: tuple[float, ...]
    margins: tuple[Estimate, ...]
    controls: tuple[tuple[float, ...], ...]
    items: int

    @property
    def rises(self) -> bool:
        """Whether the margin rises from each strength to the next."""
        means = [estimate.mean for estimate in self.margins]
        return all(before < after for before, after in pairwise(means))

    @property
    def clear_of_controls(self) -> bool:
        """Whether the interval lies above every random direction at the highest strength, and below at the lowest."""
        lowest, highest = self.margins[0], self.margins[-1]
        return all(lowest.high < control[0] and highest.low > control[-1] for control in self.controls)

    def as_rows(self) -> list[dict[str, Any]]:
        """One plain dict per strength."""
        return [
            {
                "strength": strength,
                "margin": estimate.mean,
                "low": estimate.low,
                "high": estimate.high,
                "random": [control[place] for control in self.controls],
            }
            for place, (strength, estimate) in enumerate(zip(self.strengths, self.margins, strict=True))
        ]


def dose_response(
    model: nn.Module,
    tokenizer: Any,
    data: ContrastSet,
    vector: SteeringVector,
    strengths: Sequence[float],
    *,
    controls: int = 5,
    batch_size: int = 16,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> Curve:
    """Measure the preference margin at several strengths, and that of random directions of the same norm.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        data: held-out pairs with both answers.
        vector: the vector.
        strengths: in rising order.
        controls: number of random directions.
        batch_size: rows per pass.
        seed: fixes the random directions and the bootstrap.
        step: called after each measurement, for a progress bar.

    Raises:
        DataError: an item lacks an answer.
    """
    base = preference_margin(model, tokenizer, data, batch_size=batch_size)

    def measure(other: SteeringVector, strength: float) -> Any:
        bare = strength == 0.0
        values = (
            base
            if bare
            else preference_margin(model, tokenizer, data, vector=other, strength=strength, batch_size=batch_size)
        )
        step()
        return values

    margins = tuple(bootstrap(measure(vector, strength), seed=seed) for strength in strengths)
    randoms = [random_like(vector, seed=seed + 1 + number) for number in range(controls)]
    return Curve(
        strengths=tuple(strengths),
        margins=margins,
        controls=tuple(tuple(float(measure(other, strength).mean()) for strength in strengths) for other in randoms),
        items=len(data),
    )


def random_like(vector: SteeringVector, *, seed: int) -> SteeringVector:
    """The same vector with random directions of the same norms.

    Args:
        vector: the vector to imitate.
        seed: fixes the draw.
    """
    # One generator for all tensors: a seed per place would give two controls the same draw at neighbouring sites.
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: random_direction(tensor, generator) if name.endswith("/direction") else tensor
        for name, tensor in sorted(vector.tensors.items())
    }
    return replace(vector, tensors=tensors)
