"""Methods side by side: each calibrated to the same budget on the same data, with its effect, costs and time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steerkit.evaluate.calibration.result import Calibration
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.overhead import decoding_overhead
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.trial import Trial
from steerkit.methods._base import Method
from steerkit.network.sites import sites_text
from steerkit.prompts.conversation import Conversation

__all__ = ["COSTS", "Row", "answered", "compared"]

COSTS = ("kl", "perplexity_ratio", "repetition")


@dataclass(frozen=True)
class Row:
    """One method of a comparison.

    Attributes:
        method: its name.
        title: its title.
        recipe: what it was fitted by.
        sites: where it acts.
        strength: at which it was measured; None where nothing was found.
        works: whether the effect is clear of its controls inside the budget.
        verdict: the same in one line.
        effect: change of the effect against the unsteered model, on held-out items, counted so that more is better.
        controls: lowest and highest change among random directions and fits on shuffled labels.
        costs: column name to what steering changed.
        overhead: decoding time over the unsteered model's.
        texts: prompt, unsteered and steered answer.
        own_costs: no budget held: the costs are what they are.
        wordings: of system prompts, as plain data: each with its figures on the held-out items, and the effect on the
            training items, by which one was chosen.
    """

    method: str
    title: str
    recipe: str
    sites: tuple[str, ...]
    strength: float | None
    works: bool
    verdict: str
    effect: Estimate | None = None
    controls: tuple[float, float] | None = None
    costs: Mapping[str, Estimate] | None = None
    overhead: Estimate | None = None
    texts: tuple[tuple[str, str, str], ...] = ()
    own_costs: bool = False
    wordings: tuple[Mapping[str, Any], ...] = ()

    @property
    def place(self) -> str:
        """Where it acts and how strongly, in few words; a dash where nothing was found."""
        if self.strength is not None:
            return f"{sites_text(self.sites)}, {self.strength:g}"
        return f"best of {len(self.wordings)}" if self.wordings else "-"

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        costs = self.costs or {}
        return {
            "method": self.method,
            "title": self.title,
            "recipe": self.recipe,
            "sites": list(self.sites),
            "strength": self.strength,
            "works": self.works,
            "verdict": self.verdict,
            "effect": _plain(self.effect),
            "random": None if self.controls is None else list(self.controls),
            **{name: _plain(costs.get(name)) for name in COSTS},
            "overhead": _plain(self.overhead),
            "texts": [dict(zip(("prompt", "baseline", "steered"), text, strict=True)) for text in self.texts],
            "own_costs": self.own_costs,
            "wordings": [dict(wording) for wording in self.wordings],
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Row:
        """Read what `as_json` wrote.

        Args:
            row: plain data.
        """

        def estimate(name: str) -> Estimate | None:
            found = row[name]
            return None if found is None else Estimate(found["mean"], _end(found["low"], -1), _end(found["high"], 1))

        costs = {name: found for name in COSTS if (found := estimate(name)) is not None}
        return cls(
            method=row["method"],
            title=row["title"],
            recipe=row["recipe"],
            sites=tuple(row["sites"]),
            strength=row["strength"],
            works=row["works"],
            verdict=row["verdict"],
            effect=estimate("effect"),
            controls=None if row["random"] is None else (row["random"][0], row["random"][1]),
            costs=costs or None,
            overhead=estimate("overhead"),
            texts=tuple((text["prompt"], text["baseline"], text["steered"]) for text in row["texts"]),
            own_costs=row.get("own_costs", False),  # earlier tables have no such rows
            wordings=tuple(row.get("wordings", ())),
        )


def compared(
    setup: Setup,
    method: type[Method],
    recipe: str,
    found: Calibration,
    questions: Sequence[str],
) -> Row:
    """One method's row, from its calibration.

    Args:
        setup: model, tokenizer and held-out items.
        method: its class.
        recipe: what it was fitted by.
        found: its calibration.
        questions: answered with and without.
    """
    common: dict[str, Any] = {
        "method": method.name,
        "title": method.title,
        "recipe": recipe,
        "works": found.works,
        "verdict": found.verdict,
    }
    if found.vector is None or found.strength is None or found.curve is None:
        return Row(sites=(), strength=None, **common)
    measured = found.confirmed[found.effect]
    means = [control[found.strength] for control in found.curve.controls] + list(found.shuffled)
    controls = [measured.gain_of(mean) for mean in means]
    trial = setup.trial(found.vector, found.strength)
    return Row(
        sites=tuple(map(str, found.vector.sites)),
        strength=found.strength,
        effect=measured.gain,
        controls=(min(controls), max(controls)) if controls else None,
        costs={name: found.confirmed[name].effect for name in COSTS},
        overhead=decoding_overhead(trial),
        texts=answered(trial, questions),
        **common,
    )


def answered(trial: Trial, questions: Sequence[str], *, new_tokens: int = 40) -> tuple[tuple[str, str, str], ...]:
    """Questions with the answers of the unsteered model and of a trial.

    Args:
        trial: steered.
        questions: each is asked once.
        new_tokens: length of the answers.
    """
    asked = [*dict.fromkeys(questions)]
    prompts = [*map(Conversation, asked)]
    steered = trial.answered(prompts, max_new_tokens=new_tokens)  # and the baseline with it
    return tuple(zip(asked, trial.baseline.answered(prompts, max_new_tokens=new_tokens), steered, strict=True))


def _plain(found: Estimate | None) -> dict[str, float] | None:
    return None if found is None else found._asdict()


def _end(end: float | None, sign: int) -> float:
    """An end of an interval; what no number bounds is infinite on its side."""
    return sign * math.inf if end is None else end
