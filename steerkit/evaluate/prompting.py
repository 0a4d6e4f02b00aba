"""Asking beside steering: what system prompts do, and what a vector adds to them, measured as a vector is.

A system prompt is a condition like a vector at a strength: the same held-out items are scored behind it, and every
change is one against the unsteered model without it. On neutral texts the answer's tokens are the same with and
without, so there are two predictions of each of them; KL divergence and perplexity compare these as under steering.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from steerkit.errors import DataError
from steerkit.evaluate.scorers._base import Scorer
from steerkit.evaluate.scoring import Measured, scorer_of
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store import Store
from steerkit.evaluate.store_identity import digest_of, setup_identity
from steerkit.evaluate.sweeps import measure_point
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["NEUTRAL", "Prompting", "Spread", "Wording", "measure_prompting", "training_gains"]

NEUTRAL = (
    "Answer the question of the user.",
    "You are an assistant. Reply to what the user writes, in a few sentences.",
    "Read what the user writes and answer it in the way in which you usually would.",
)
"""System prompts that ask for nothing: what a system prompt does because it is there, whatever it says."""


class Spread(NamedTuple):
    """One figure over several wordings.

    Attributes:
        mean: of all wordings.
        lowest: of any wording.
        highest: of any wording.
    """

    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Wording:
    """One system prompt, measured.

    Attributes:
        system: its text.
        scores: column name to figure; changes are against the unsteered model without a system prompt.
    """

    system: str
    scores: Mapping[str, Measured]


@dataclass(frozen=True)
class Prompting:
    """Several wordings of one request, each measured.

    Attributes:
        wordings: one for each system prompt, in their order.
    """

    wordings: tuple[Wording, ...]

    def spread(self, column: str) -> Spread:
        """The effect of the wordings on one figure: its mean over them, the lowest and the highest.

        Args:
            column: the figure.
        """
        means = [wording.scores[column].effect.mean for wording in self.wordings]
        return Spread(statistics.fmean(means), min(means), max(means))

    def as_json(self) -> dict[str, Any]:
        """Plain data: the wordings with their figures, and over them the mean and the range of each effect."""
        columns = self.wordings[0].scores
        return {
            "wordings": [
                {"system": wording.system, "scores": {name: one.as_row() for name, one in wording.scores.items()}}
                for wording in self.wordings
            ],
            "over_wordings": {name: self.spread(name)._asdict() for name in columns},
        }


def measure_prompting(
    setup: Setup,
    systems: Sequence[str],
    scorers: Sequence[str | Scorer] = ("preference_margin", "divergence", "repetition"),
    *,
    vector: SteeringVector | None = None,
    strength: float | None = None,
    store: Store | None = None,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> Prompting:
    """Measure system prompts, alone or with a vector on top.

    Args:
        setup: model, tokenizer and held-out items, without a system prompt of its own.
        systems: the system prompts.
        scorers: names, or scorers with their settings.
        vector: steers on top of each; None measures the system prompts alone.
        strength: of the vector.
        store: figures already there are not measured again; None keeps none.
        seed: fixes the intervals.
        step: called before each measurement, for a progress line.

    Returns:
        Every wording with its figures.

    Raises:
        DataError: no system prompt, or the items lack what a scorer needs.
        SteerError: see `steerkit.steer`.
    """
    if not systems:
        raise DataError("prompting: got no system prompt; give at least one")
    chosen, kept = [scorer_of(scorer) for scorer in scorers], Store() if store is None else store
    found = []
    for system in systems:
        step()
        prompted = setup.prompted(system)
        identity = digest_of(setup_identity(prompted))
        scores = measure_point(prompted, vector, strength, chosen, identity=identity, store=kept, seed=seed)
        found.append(Wording(system, scores))
    return Prompting(tuple(found))


def training_gains(
    setup: Setup, train: ContrastSet, systems: Sequence[str], scorer: str | Scorer = "preference_margin", **options: Any
) -> list[float]:
    """What each wording gains on training items, for choosing one without a look at the held-out items.

    Args:
        setup: model and tokenizer.
        train: training items.
        systems: the system prompts.
        scorer: its first column is what counts.
        options: as for `measure_prompting`.

    Returns:
        Per wording the gain, counted so that more is better.
    """
    one = scorer_of(scorer)
    found = measure_prompting(replace(setup, data=train, prompts=None), systems, [one], **options)
    return [wording.scores[next(iter(one.columns))].gain.mean for wording in found.wordings]
