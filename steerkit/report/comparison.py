"""Several methods side by side as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerkit.network.sites import sites_text
from steerkit.report import plots
from steerkit.report.heat_cells import given
from steerkit.report.page import embedded_picture, render_page
from steerkit.report.pareto import pareto_front

__all__ = ["comparison_html"]


def comparison_html(comparison: Mapping[str, Any]) -> str:
    """The report of several methods side by side as one HTML page.

    Args:
        comparison: plain data as `steerkit compare` writes it: `behaviour`, `model`, `budget`, `environment`,
            `command`, `digests`, and `rows` with a method's figures each (see `steerkit.evaluate.compare.Row.as_json`).

    Returns:
        HTML that loads nothing from outside.

    Raises:
        SteerError: matplotlib is not installed.
    """
    plots.ready()
    rows = [{"own_costs": False, "wordings": [], **row} for row in comparison["rows"]]
    bars = [
        plots.Bar(
            row["method"], given(row["effect"]), None if row["random"] is None else tuple(row["random"]), row["works"]
        )
        for row in rows
    ]
    spots = [
        plots.Spot(row["method"], row["kl"]["mean"], row["effect"]["mean"], _kind(row))
        for row in rows
        if row["effect"] is not None and row["kl"] is not None
    ]
    label = "change of the preference margin (nats per token)"
    return render_page(
        "comparison.html.j2",
        comparison=comparison,
        rows=[{**row, "where": sites_text(row["sites"])} for row in rows],
        forest=embedded_picture(plots.forest_svg(bars, effect=label), "effects of the methods with intervals"),
        scatter=embedded_picture(
            plots.spots_svg(
                spots,
                kinds=["confirmed", "not confirmed", "system prompts, at their own costs"],
                effect=label,
                cost="KL divergence on neutral texts (nats per token)",
                front=pareto_front(spots),
            ),
            "effect against KL divergence",
        )
        if spots
        else "",
        methods=[row["method"] for row in rows if not row["own_costs"]],
        working=[row["method"] for row in rows if row["works"] and not row["own_costs"]],
        recipe="",
    )


def _kind(row: Mapping[str, Any]) -> int:
    return 2 if row["own_costs"] else 0 if row["works"] else 1
