"""What steering may cost (`Budget`), and how layers and strength are looked for (`Search`)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from steerkit.errors import DataError, near_miss
from steerkit.evaluate.scoring import Measured

__all__ = ["SCREENS", "Budget", "Search"]

SCREENS = ("steering", "attribution")


@dataclass(frozen=True)
class Budget:
    """What steering may cost, against the unsteered model.

    Attributes:
        max_kl: nats per token on neutral texts.
        max_ppl_ratio: perplexity of neutral texts over that of the unsteered model.
        max_repetition: rise of the share of repeated 4-grams in generated texts.
    """

    max_kl: float = 0.3
    max_ppl_ratio: float = 1.3
    max_repetition: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not math.isfinite(value) or value < 0:
                raise DataError(f"budget: {name} is {value}; give a finite number of at least 0")

    def breaks(self, scores: Mapping[str, Measured], due: Collection[str] = ("kl", "perplexity_ratio")) -> list[str]:
        """List the costs that exceed the budget, in words. A cost that is due and was not measured is no cost of 0.

        Args:
            scores: column name to figure.
            due: costs that have to be there; of the others only those that are there count.
        """
        found = []
        for column, (name, limit) in self.limits.items():
            measured = scores.get(column)
            if measured is None:
                found += [f"{name} was not measured"] if column in due else []
            elif measured.lost:
                found.append(
                    f"{name} could not be measured on {measured.lost} of {measured.items + measured.lost} texts"
                )
            elif not measured.effect.mean <= limit:  # nan is outside
                found.append(f"{name} {measured.effect.mean:.3g} over {limit:g}")
        return found

    def holds(self, scores: Mapping[str, Measured]) -> bool | None:
        """Whether costs are clearly inside or outside the budget, with their whole intervals; None if neither.

        Args:
            scores: column name to figure.
        """
        found = [(scores[column].effect, limit) for column, (_, limit) in self.limits.items() if column in scores]
        if any(cost.low > limit for cost, limit in found):
            return False
        is_inside = not self.breaks(scores) and all(cost.high <= limit for cost, limit in found)
        return True if is_inside else None

    @property
    def limits(self) -> dict[str, tuple[str, float]]:
        """Column to the cost's name and its limit."""
        return {
            "kl": ("KL", self.max_kl),
            "perplexity_ratio": ("perplexity ratio", self.max_ppl_ratio),
            "repetition": ("rise of repetition", self.max_repetition),
        }


@dataclass(frozen=True)
class Search:
    """How the layers and the strength are looked for.

    Attributes:
        candidates: sets of layers; None takes `default_candidates`.
        strengths: the ladder, rising; None takes the method's own.
        validation: share of the training items that is kept from fitting to choose on.
        finalists: candidates that climb the ladder after screening.
        screened_items: items of the validation split used for screening.
        neutral_texts: neutral texts used for choosing; the other half of all of them confirms.
        controls: random directions, and fits on shuffled labels, of the confirmation.
        trials: number of points an optimiser (optuna) may try instead of the ladder; None climbs.
        seed: fixes splits, controls, intervals and the optimiser.
        together: whether the best single blocks are tried together too.
        screen: how candidates are ranked before the best climb: `steering` at each, at one strength; or `attribution`,
            slopes of their effects and costs for all at once, after which only those near the best climb.
        settings: settings of the method with the values that are tried, each with each, such as ``{"heads": [8, 16]}``.
    """

    candidates: Sequence[Sequence[int]] | None = None
    strengths: Sequence[float] | None = None
    validation: float = 0.25
    finalists: int = 2
    screened_items: int = 10
    neutral_texts: int = 12
    controls: int = 5
    trials: int | None = None
    seed: int = 0
    together: bool = True
    screen: str = "steering"
    settings: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.screen not in SCREENS:
            raise DataError(f"search: screen {self.screen!r}; {near_miss(str(self.screen), SCREENS)}")
        if self.controls < 1 or self.finalists < 1 or self.screened_items < 2 or self.neutral_texts < 1:
            raise DataError(
                f"search: {self.controls} controls, {self.finalists} finalists, {self.screened_items} items to screen "
                f"on, {self.neutral_texts} neutral texts; give at least 1 of each, and 2 items"
            )

    @property
    def variants(self) -> list[dict[str, Any]]:
        """Settings of the method to try, one after the other; the method's own alone where none are named."""
        return [dict(zip(self.settings, values, strict=True)) for values in product(*self.settings.values())]
