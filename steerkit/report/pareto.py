"""Effect against cost: which points no other beats in both."""

from __future__ import annotations

from collections.abc import Iterable

from steerkit.report import plots
from steerkit.report.evidence import Evidence
from steerkit.report.figures_text import signed
from steerkit.report.page import PagePart, embedded_picture

__all__ = ["pareto_front", "pareto_part"]


def pareto_front(spots: Iterable[plots.Spot]) -> list[tuple[float, float]]:
    """(cost, effect) of the points that no other beats in both, from the cheapest on."""
    front: list[tuple[float, float]] = []
    for spot in sorted(spots, key=lambda one: (one.cost, -one.effect)):
        if not front or spot.effect > front[-1][1]:
            front.append((spot.cost, spot.effect))
    return front


def pareto_part(evidence: Evidence) -> PagePart | None:
    """Effect against KL divergence, with the points that no other beats in both.

    Args:
        evidence: what was measured.
    """
    spots = evidence.spots
    if not spots:
        return None
    column = evidence.curve.points[0][evidence.curve.effect].column
    front = pareto_front(spots)
    # Only what is on the front, and the curve, is named: calibrations try dozens of points.
    named = [spot if spot.kind == 0 or (spot.cost, spot.effect) in front else spot._replace(label="") for spot in spots]
    picture = plots.spots_svg(
        named,
        kinds=["this report, held-out items", "calibration, validation items"],
        effect=f"change of the {column.title}\n({column.unit})",
        cost="KL divergence on neutral texts (nats per token)",
        front=front,
    )
    chosen = next((spot for spot in spots if spot.chosen), None)
    tried = sum(spot.kind == 1 for spot in spots)
    words = (
        f"{len(front)} of {len(spots)} points are on the front: no other point has more effect for less KL divergence."
    )
    if chosen is not None:
        place = "on" if (chosen.cost, chosen.effect) in front else "not on"
        words += (
            f" The suggested strength (ring) buys {signed(chosen.effect)} {column.unit} for {chosen.cost:.3g} nats "
            f"per token and is {place} it."
        )
    words += (
        f" {tried} points come from the calibration kept in the vector's file."
        if tried
        else (" The vector's file holds no calibration, so these are the strengths of this report only.")
    )
    return PagePart(embedded_picture(picture, "effect against KL divergence"), words)
