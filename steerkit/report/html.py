"""Reports: everything that is known of one vector on one model, in one HTML file without links to anything outside.

`gather` measures and gives plain results, `report_html` turns them into a page and measures nothing. The page works
without JavaScript, its pictures are SVG inside it, and the same evidence gives the same bytes: it bears no date.
"""

from __future__ import annotations

from dataclasses import asdict

from steerkit._support.json_values import jsonable
from steerkit.report import plots
from steerkit.report.evidence import Evidence
from steerkit.report.heat_cells import heat_part
from steerkit.report.page import json_text, render_page
from steerkit.report.pareto import pareto_part
from steerkit.report.sections import costs_part, layers_part, projections_part, strength_part
from steerkit.report.tables import control_rows, costs_words, fact_rows

__all__ = ["report_html"]


def report_html(evidence: Evidence) -> str:
    """The report of a vector as one HTML page.

    Args:
        evidence: what `gather` gave.

    Returns:
        HTML that loads nothing from outside.

    Raises:
        SteerError: matplotlib is not installed.
    """
    plots.ready()
    return render_page(
        "report.html.j2",
        evidence=evidence,
        verdict=evidence.verdict,
        costs_words=costs_words(evidence),
        facts=fact_rows(evidence),
        layers=layers_part(evidence),
        projections=projections_part(evidence),
        by_strength=strength_part(evidence),
        costs=costs_part(evidence),
        pareto=pareto_part(evidence),
        controls=control_rows(evidence),
        heat=heat_part(evidence),
        mirrored=2 * (evidence.neutral or 0.0) - evidence.strength,
        recipe=json_text(evidence.vector.get("extra", {}).get("recipe")),
        plan=json_text(jsonable(asdict(evidence.plan))),
    )
