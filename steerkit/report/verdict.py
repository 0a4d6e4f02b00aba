"""What the figures of a report amount to, in one sentence, and the points of its cost picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from steerkit.evaluate.intervals import too_few
from steerkit.evaluate.scoring import Measured
from steerkit.report.figures_text import signed, span
from steerkit.report.plots.scatter import Spot

if TYPE_CHECKING:
    from steerkit.report.evidence import Evidence

__all__ = ["is_clear", "spots_of", "verdict_of"]


def verdict_of(evidence: Evidence) -> tuple[str, str]:
    """The judgement in a few words, and the figures it rests on."""
    measured = evidence.suggested[evidence.curve.effect]
    column, change = measured.column, measured.effect
    sign = 1 if evidence.strength >= (evidence.neutral or 0.0) else -1
    certain = sign * (change.low if sign > 0 else change.high) > 0
    baseline = measured.estimate.mean - change.mean
    moved = "rises" if change.mean > 0 else "falls"
    said = (
        f"At strength {evidence.strength:g} the {column.title} on {measured.items} held-out items {moved} by "
        f"{abs(change.mean):.3g} {column.unit} against the unsteered model (95 % interval of the change "
        f"{span(change)}), from {baseline:.3g} to {measured.estimate.mean:.3g}."
    )
    clear, most = True, 0.0
    if evidence.randoms:
        most = max(sign * (one - baseline) for one in evidence.randoms)
        clear = is_clear(measured, evidence.randoms, sign)
        named = (
            "The one random direction of the same norm that was measured"
            if len(evidence.randoms) == 1
            else f"The largest of {len(evidence.randoms)} random directions of the same norm"
        )
        said += f" {named} changes it by {signed(sign * most)}: the effect is {'' if clear else 'not '}clear of it."
    if certain and clear:
        return f"It steers: the effect is clear of zero{_beside(len(evidence.randoms))}.", said
    gain = change if sign > 0 else change.mirrored()
    if too_few(gain, measured.items, over=most if certain else 0.0):
        beyond = "what a random direction does" if certain else "zero"
        return (
            f"Too few items to tell: on {measured.items} the interval of the change reaches from {beyond} to an effect "
            "that would count.",
            said,
        )
    if not certain:
        return "No effect shown: the interval of the change includes zero or lies on the other side.", said
    return "In doubt: a random direction of the same norm may do as much.", said


def _beside(randoms: int) -> str:
    """What else the effect is clear of."""
    if not randoms:
        return "; no random direction was measured"
    return (
        " and of one random direction, the only one measured"
        if randoms == 1
        else f" and of {randoms} random directions"
    )


def is_clear(measured: Measured, controls: Sequence[float], sign: int) -> bool:
    """Whether the change that steering made lies beyond that of every control, interval included.

    Changes on the same items are compared: what items differ in is no doubt about what steering changes in them.

    Args:
        measured: the effect.
        controls: mean effects of vectors with nothing learned in them, on the same items.
        sign: 1 where more is meant, -1 where less is.
    """
    change = measured.effect
    changes = [control - measured.estimate.mean + change.mean for control in controls]
    return change.low > max(changes) if sign > 0 else change.high < min(changes)


def spots_of(evidence: Evidence) -> list[Spot]:
    """Effect and KL divergence of every point known: the curve's, and those of the calibration in the file.

    Args:
        evidence: what was measured.
    """
    spots = []
    for strength, point in zip(evidence.curve.strengths, evidence.curve.points, strict=True):
        measured = point[evidence.curve.effect]
        effect, cost = measured.effect.mean, point["kl"].estimate.mean
        spots.append(Spot(f"{strength:+g}", cost, effect, 0, chosen=strength == evidence.strength))
    for row in (evidence.calibration or {}).get("validation", ()):
        effect, kl = row["scores"].get(evidence.curve.effect), row["scores"].get("kl")
        if row["strength"] is None or effect is None or kl is None or "change" not in effect:
            continue
        label = f"{'+'.join(map(str, row['layers']))} at {row['strength']:g}"
        spots.append(Spot(label, kl["mean"], effect["change"], 1))
    return spots
