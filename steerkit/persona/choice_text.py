"""What the card of a persona vector says of its filter and of its calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerkit.export.weights_card import number
from steerkit.persona.filtering import Rules
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["tried_text", "way_text"]


def way_text(judge: str | None, rules: Rules) -> str:
    """How pairs were filtered.

    Args:
        judge: who rated; None where probabilities did.
        rules: when a pair is kept.
    """
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


def tried_text(vector: SteeringVector) -> list[str]:
    """What was measured on both halves of the held-out questions, as tables.

    Args:
        vector: with its calibration in it.
    """
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
            f"| {number(kl.get('mean'), 2)} | {number(ratio.get('mean'), 2)} |"
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
    if "change" not in row:
        return "-"
    ends = ("-" if row.get(end) is None else f"{row[end]:+.2f}" for end in ("change_low", "change_high"))
    return f"{row['change']:+.2f} ({' to '.join(ends)})"
