"""What the card of a persona vector says of its filter."""

from __future__ import annotations

from steerkit.persona.filtering import Rules

__all__ = ["way_text"]


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
