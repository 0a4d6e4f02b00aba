"""TODO persona.choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from steerkit.errors import DataError
from steerkit.evaluate.calibration.budget import Budget
from steerkit.evaluate.calibration.result import Calibration
from steerkit.persona.filtering import Rules
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["READOUTS", "Choice", "by_ones", "most_answers", "pairs_taken", "tried_text", "way_text"]

READOUTS = ("response_mean", "prompt_mean", "prompt_last")


@dataclass(frozen=True)
class Choice:
    """How the layer is chosen, and what the vector is read from.

    Attributes:
        readout: tokens read: response_mean, prompt_mean or prompt_last.
        layers: blocks to choose from; None takes eight between a quarter and four fifths of the depth.
        strengths: the ladder, rising; None takes the method's own.
        budget: what steering may cost.
        neutral: neutral texts that costs are measured on, half of them to choose and half to confirm.
        screened: held-out pairs that every block is screened on.
        finalists: blocks that climb the ladder after screening.
        controls: random directions, and fits on shuffled labels, of the confirmation.
        texts: prompts answered at the most.
        max_new_tokens: length of those answers, in tokens.
    """

    readout: str = "response_mean"
    layers: tuple[int, ...] | None = None
    strengths: tuple[float, ...] | None = None
    budget: Budget = field(default_factory=Budget)
    neutral: int = 16
    screened: int = 8
    finalists: int = 2
    controls: int = 3
    texts: int = 8
    max_new_tokens: int = 40

    def __post_init__(self) -> None:
        if self.readout not in READOUTS:
            raise DataError(f"readout {self.readout!r}: persona vectors are read from {', '.join(READOUTS)}")
        if self.layers == ():
            raise DataError("layers: got none; give at least one block, or None for the method's own")


def pairs_taken(data: ContrastSet, wanted: Sequence[bool]) -> ContrastSet | None:
    """Some pairs of a contrast set; None where there are none."""
    places = [place for place, take in enumerate(wanted) if take]
    if not places:
        return None
    positive, negative = (tuple(side[place] for place in places) for side in (data.positive, data.negative))
    return replace(data, positive=positive, negative=negative, marks=())


def by_ones(advance: Callable[[], None]) -> Callable[[int], None]:
    def step(rows: int) -> None:
        for _ in range(rows):
            advance()

    return step


def way_text(judge: str | None, rules: Rules) -> str:
    """How pairs were filtered."""
    if judge is not None:
        return (
            f"Filter: a judge (`{judge}`) rated trait and coherence from 0 to 100; a pair is kept if the positive "
            f"answer has at least {rules.trait:g}, the negative one less than {100 - rules.trait:g}, and both at least "
            f"{rules.coherence:g} for coherence."
        )
    return (
        "Filter: **no judge was asked.** A pair is kept if each answer is likelier under its own system prompt than "
        f"under the other one (by more than {rules.margin:g} nats per token), no more than {rules.repetition:.0%} of "
        "its 4-grams are repeated, and it is no plain refusal. That does not say that the trait is there to be seen."
    )


def most_answers(found: Calibration) -> tuple[int, ...] | None:
    """The layer with the largest effect inside the budget, sure or not, as the paper chooses; None without any."""
    inside = [point for point in found.points if not found.budget.breaks(dict(point.scores))]
    best = max(inside, key=lambda point: point.scores[found.effect].gain.mean, default=None)
    return None if best is None or not best.scores[found.effect].gain.mean > 0 else best.layers


def tried_text(vector: SteeringVector) -> list[str]:
    """What was measured on both halves of the held-out questions, as tables."""
    found = vector.held_out.get("calibration")
    if not found:
        return []
    lines = ["", f"Chosen on one half of the held-out questions by `{found['effect']}`:", ""]
    lines += ["| layer | strength | change (95 %) | KL | perplexity ratio |", "| --- | --- | --- | --- | --- |"]
    for row in found["validation"]:
        scores = row["scores"]
        effect, kl, ratio = (scores.get(name, {}) for name in (found["effect"], "kl", "perplexity_ratio"))
        lines.append(
            f"| {'+'.join(map(str, row['layers']))} | {row['strength']:g} | {_span(effect)} "
            f"| {kl.get('mean', 0):.2f} | {ratio.get('mean', 0):.2f} |"
        )
    if not found["curve"]:
        return lines
    lines += ["", "Measured on the other half, beside random directions of the same norm:", ""]
    lines += ["| strength | effect | 95 % interval | random directions |", "| --- | --- | --- | --- |"]
    for row in found["curve"]:
        reached = f"{min(row['random']):.2f} to {max(row['random']):.2f}" if row["random"] else "-"
        ends = " to ".join("-" if end is None else f"{end:.2f}" for end in (row["low"], row["high"]))
        lines.append(f"| {row['strength']:g} | {row['effect']:.2f} | {ends} | {reached} |")
    return lines


def _span(row: Mapping[str, Any]) -> str:
    """A change with its interval."""
    ends = ("-" if row.get(end) is None else f"{row[end]:+.2f}" for end in ("change_low", "change_high"))
    return f"{row.get('change', 0):+.2f} ({' to '.join(ends)})"
