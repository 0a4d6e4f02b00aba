"""Sections of a report that have a picture and a sentence: blocks, projections, effect by strength, costs."""

from __future__ import annotations

from collections.abc import Callable

from steerkit.network.sites import Site
from steerkit.report import plots
from steerkit.report.evidence import Evidence
from steerkit.report.figures_text import mean
from steerkit.report.page import PagePart, embedded_picture
from steerkit.report.verdict import is_clear

__all__ = ["costs_part", "layers_part", "projections_part", "strength_part"]

COSTS = ("kl", "perplexity_ratio", "repetition", "words")


def layers_part(evidence: Evidence) -> PagePart | None:
    """How well a direction fitted at each block separates held-out items.

    Args:
        evidence: what was measured.
    """
    if not evidence.layers:
        return None
    own = sorted({Site.parse(site["site"]).layer for site in evidence.vector["sites"]})
    best = max(evidence.layers, key=lambda one: (one.auc, one.cohens_d))
    marked = [one for one in evidence.layers if one.layer in own]
    picture = plots.separation_svg(
        {one.layer: one.auc for one in evidence.layers},
        {one.layer: one.cohens_d for one in evidence.layers},
        own,
    )
    words = (
        f"{evidence.vector['method']} was fitted again at each of {len(evidence.layers)} blocks and each direction "
        f"measured on {evidence.items} held-out items. Block {best.layer} separates best (AUC {best.auc:.3f}, "
        f"d {best.cohens_d:.2f})"
    )
    if marked:
        listed = ", ".join(f"block {one.layer} AUC {one.auc:.3f}, d {one.cohens_d:.2f}" for one in marked)
        words += f"; the vector's own: {listed}"
    words += ". A block that separates well need not be the one that steers best."
    return PagePart(embedded_picture(picture, "AUC and Cohen's d by block"), words)


def projections_part(evidence: Evidence) -> PagePart | None:
    """Held-out items along the vector's own direction.

    Args:
        evidence: what was measured.
    """
    found = evidence.projections
    if found is None:
        return None
    picture = plots.histogram_svg(
        found.positive, found.negative, label=f"projection on the direction at {found.site} (activation units)"
    )
    words = (
        f"Held-out items along the vector's direction at {found.site}, unsteered, read at "
        f"{evidence.vector['readout'] or 'last'}: AUC {found.auc:.3f}, which is the share of couples in which the "
        f"positive item lies further along; Cohen's d {found.cohens_d:.2f}. The means (dashed) are "
        f"{mean(found.positive):.3g} and {mean(found.negative):.3g}."
    )
    return PagePart(embedded_picture(picture, "projections of both sides"), words)


def strength_part(evidence: Evidence) -> PagePart | None:
    """The effect at every strength, beside random directions.

    Args:
        evidence: what was measured.
    """
    if not evidence.has_effect:
        return None
    curve = evidence.curve
    column = curve.points[0][curve.effect].column
    first, last = curve.effects[0], curve.effects[-1]
    words = (
        f"The {column.title} goes from {first.mean:.3g} at strength {curve.strengths[0]:g} to {last.mean:.3g} at "
        f"{curve.strengths[-1]:g} ({column.unit}, {curve.items} held-out items) and "
        f"{'rises at every step' if curve.rises else 'does not rise at every step'}."
    )
    if curve.controls:
        words += f" {len(curve.controls)} random directions of the same norm give {_controls_words(evidence)}."
    picture = plots.curve_svg(curve, unit=evidence.vector["unit"], marked=evidence.strength)
    return PagePart(embedded_picture(picture, "effect over strengths"), words)


def _controls_words(evidence: Evidence) -> str:
    """What random directions reach at each strength they were measured at, and whether the effect is clear of it."""
    curve, said = evidence.curve, []
    for strength in curve.controls[0]:
        values = [control[strength] for control in curve.controls]
        reached = f"{min(values):.3g} to {max(values):.3g} at strength {strength:g}"
        if strength in curve.strengths:
            measured = curve.points[curve.strengths.index(strength)][curve.effect]
            clear = is_clear(measured, values, 1 if strength >= (evidence.neutral or 0.0) else -1)
            reached += f" ({'the effect is clear of them' if clear else 'the effect is not clear of them'})"
        said.append(reached)
    return " and ".join(said)


def costs_part(evidence: Evidence) -> PagePart:
    """The costs at every strength.

    Args:
        evidence: what was measured.
    """
    curve, panels = evidence.curve, []
    for name in COSTS:
        column = curve.points[0][name].column
        baseline = None
        if evidence.neutral in curve.strengths:
            baseline = curve.points[curve.strengths.index(evidence.neutral)][name].estimate.mean
        values = [point[name].estimate for point in curve.points]
        panels.append(plots.Panel(column.title, column.unit, curve.strengths, values, baseline))
    words = (
        "Costs with 95 % intervals; dotted is the unsteered model, dashed the suggested strength. "
        f"The KL divergence is largest {_extreme(evidence, 'kl', '.3g')} nats per token, the perplexity ratio "
        f"{_extreme(evidence, 'perplexity_ratio', '.3g')}, the share of repeated 4-grams "
        f"{_extreme(evidence, 'repetition', '.0f', scale=100)} %. Texts are shortest "
        f"{_extreme(evidence, 'words', '.0f', min)} words on average (cut off at {evidence.plan.new_tokens} tokens)."
    )
    return PagePart(
        embedded_picture(
            plots.costs_svg(panels, unit=evidence.vector["unit"], marked=evidence.strength), "costs by strength"
        ),
        words,
    )


def _extreme(evidence: Evidence, name: str, form: str, most: Callable[..., int] = max, scale: float = 1.0) -> str:
    """Where a cost is largest (or smallest), and how large it is there."""
    means = [scale * point[name].estimate.mean for point in evidence.curve.points]
    place = most(range(len(means)), key=means.__getitem__)
    return f"at strength {evidence.curve.strengths[place]:g}, with {means[place]:{form}}"
