"""Reports: everything that is known of one vector on one model, in one HTML file without links to anything outside.

`gather` measures and gives plain results, `report_html` turns them into a page and measures nothing. The page works
without JavaScript, its pictures are SVG inside it, and the same evidence gives the same bytes: it bears no date.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from steerkit.evaluate.scoring import Measured
from steerkit.network.sites import Site, sites_text
from steerkit.report import plots
from steerkit.report.evidence import Evidence
from steerkit.report.figures_text import mean, plain, signed
from steerkit.report.heat_cells import bounds_of, cell, given, heat_part
from steerkit.report.verdict import is_clear

__all__ = ["comparison_html", "report_html"]

COSTS = ("kl", "perplexity_ratio", "repetition", "words")


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
    return _page(
        "report.html.j2",
        evidence=evidence,
        verdict=evidence.verdict,
        costs_words=_costs_words(evidence),
        facts=_facts(evidence),
        layers=_layers_part(evidence),
        projections=_projections_part(evidence),
        dose=_dose_part(evidence),
        costs=_costs_part(evidence),
        pareto=_pareto_part(evidence),
        controls=_control_rows(evidence),
        heat=heat_part(evidence),
        mirrored=2 * (evidence.neutral or 0.0) - evidence.strength,
        recipe=_json(evidence.vector.get("extra", {}).get("recipe")),
        plan=_json(plain(asdict(evidence.plan))),
    )


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
    rows = list(comparison["rows"])
    bars = [
        plots.Bar(
            row["method"], given(row["effect"]), None if row["random"] is None else tuple(row["random"]), row["works"]
        )
        for row in rows
    ]
    spots = [
        plots.Spot(row["method"], row["kl"]["mean"], row["effect"]["mean"], 0 if row["works"] else 1)
        for row in rows
        if row["effect"] is not None and row["kl"] is not None
    ]
    label = "change of the preference margin (nats per token)"
    return _page(
        "comparison.html.j2",
        comparison=comparison,
        rows=[{**row, "where": sites_text(row["sites"])} for row in rows],
        forest=_picture(plots.forest_svg(bars, effect=label), "effects of the methods with intervals"),
        scatter=_picture(
            plots.spots_svg(
                spots,
                kinds=["confirmed", "not confirmed"],
                effect=label,
                cost="KL divergence on neutral texts (nats per token)",
                front=_front(spots),
            ),
            "effect against KL divergence",
        )
        if spots
        else "",
        working=[row["method"] for row in rows if row["works"]],
        recipe="",
    )


def _page(template: str, **content: Any) -> str:
    """One page from a template beside this file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(number=_number, bounds=bounds_of)
    return str(made.get_template(template).render(**content))


class _Part(NamedTuple):
    """A picture with what it says."""

    picture: str
    words: str


def _picture(svg: str, alt: str) -> Any:
    """A picture as an image that holds its own data: nothing in it meets the ids and styles of the page."""
    from markupsafe import Markup, escape

    data = base64.b64encode(svg.encode()).decode()
    return Markup(f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(alt)}">')


def _costs_words(evidence: Evidence) -> str:
    """What steering costs at the suggested strength."""
    found = evidence.suggested
    return (
        f"Costs: KL divergence {cell(found['kl'].effect, '.3g')} nats per token and perplexity ratio "
        f"{cell(found['perplexity_ratio'].effect, '.3g')} on {found['kl'].items} neutral texts; share of repeated "
        f"4-grams {_change(found['repetition'], '+.3g')} and length {_change(found['words'], '+.3g')} words over "
        f"{found['repetition'].items} generated texts."
    )


def _change(measured: Measured, form: str) -> str:
    """A change against the unsteered model; of the unsteered model itself there is none."""
    return "+0" if measured.change is None else cell(measured.change, form)


def _facts(evidence: Evidence) -> list[tuple[str, str]]:
    """The head's table."""
    vector, model = evidence.vector, evidence.model
    suggested = vector["suggested_strength"]
    strength = f"{evidence.strength:g} ({vector['unit']} unit)"
    return [
        ("method", f"{vector['method']}: {evidence.title}"),
        ("paper", vector["paper"] or "none named"),
        (
            "model",
            f"{model['name'] or model['class']} ({model['type']}, {model['blocks']} blocks, width {model['width']}, "
            f"{model['dtype']})",
        ),
        ("sites", ", ".join(site["site"] for site in vector["sites"])),
        ("tokens", f"read: {vector['readout'] or 'by the method itself'}; written: {vector['scope']}"),
        ("suggested strength", strength if suggested is not None else f"none in the file; {strength} is shown"),
    ]


def _layers_part(evidence: Evidence) -> _Part | None:
    if not evidence.layers:
        return None
    own = sorted({Site.parse(site["site"]).layer for site in evidence.vector["sites"]})
    best = max(evidence.layers, key=lambda one: (one.auc, one.cohens_d))
    marked = [one for one in evidence.layers if one.block in own]
    picture = plots.separation_svg(
        {one.block: one.auc for one in evidence.layers},
        {one.block: one.cohens_d for one in evidence.layers},
        own,
    )
    words = (
        f"{evidence.vector['method']} was fitted again at each of {len(evidence.layers)} blocks and each direction "
        f"measured on {evidence.items} held-out items. Block {best.block} separates best (AUC {best.auc:.3f}, "
        f"d {best.cohens_d:.2f})"
    )
    if marked:
        listed = ", ".join(f"block {one.block} AUC {one.auc:.3f}, d {one.cohens_d:.2f}" for one in marked)
        words += f"; the vector's own: {listed}"
    words += ". A block that separates well need not be the one that steers best."
    return _Part(_picture(picture, "AUC and Cohen's d by block"), words)


def _projections_part(evidence: Evidence) -> _Part | None:
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
    return _Part(_picture(picture, "projections of both sides"), words)


def _dose_part(evidence: Evidence) -> _Part | None:
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
    return _Part(_picture(picture, "effect over strengths"), words)


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


def _costs_part(evidence: Evidence) -> _Part:
    curve, panels = evidence.curve, []
    for name in COSTS:
        column = curve.points[0][name].column
        baseline = None
        if evidence.neutral in curve.strengths:
            baseline = curve.points[curve.strengths.index(evidence.neutral)][name].estimate.mean
        values = [point[name].estimate for point in curve.points]
        panels.append(plots.Panel(column.title, column.unit, curve.strengths, values, baseline))
    worst = max(range(len(curve.points)), key=lambda place: curve.points[place]["kl"].estimate.mean)
    kl, ratio = (curve.points[worst][name].estimate.mean for name in ("kl", "perplexity_ratio"))
    loops = max(point["repetition"].estimate.mean for point in curve.points)
    shortest = min(point["words"].estimate.mean for point in curve.points)
    words = (
        f"Costs with 95 % intervals; dotted is the unsteered model, dashed the suggested strength. They are largest at "
        f"strength {curve.strengths[worst]:g}, with a KL divergence of {kl:.3g} nats per token and a perplexity ratio "
        f"of {ratio:.3g}. Generated texts repeat at most {100 * loops:.0f} % of their 4-grams and have at least "
        f"{shortest:.0f} words on average (cut off at {evidence.plan.new_tokens} tokens)."
    )
    return _Part(
        _picture(plots.costs_svg(panels, unit=evidence.vector["unit"], marked=evidence.strength), "costs by strength"),
        words,
    )


def _front(spots: Iterable[plots.Spot]) -> list[tuple[float, float]]:
    """(cost, effect) of the points that no other beats in both, from the cheapest on."""
    front: list[tuple[float, float]] = []
    for spot in sorted(spots, key=lambda one: (one.cost, -one.effect)):
        if not front or spot.effect > front[-1][1]:
            front.append((spot.cost, spot.effect))
    return front


def _pareto_part(evidence: Evidence) -> _Part | None:
    spots = evidence.spots
    if not spots:
        return None
    column = evidence.curve.points[0][evidence.curve.effect].column
    front = _front(spots)
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
    return _Part(_picture(picture, "effect against KL divergence"), words)


def _control_rows(evidence: Evidence) -> list[tuple[str, str, str]]:
    """What was done, what came out, and what it means."""
    rows = []
    for site, found in (evidence.refits or {}).get("sites", {}).items():
        half, again, mixed = found.get("split_half"), found.get("bootstrap"), found.get("shuffled")
        if half:
            rows.append(
                (f"split half, {site}", f"cosine {cell(given(half), '.3f')}", "two halves of the items agree at 1")
            )
        if again:
            rows.append(
                (
                    f"bootstrap, {site}",
                    f"cosine {again['cosine']:.3f}, 2.5 % of draws below {again['cosine_low']:.3f}",
                    "items drawn anew give the same direction at 1",
                )
            )
        if mixed:
            lengths, cosines = ([one[name] for one in mixed] for name in ("relative_length", "cosine"))
            rows.append(
                (
                    f"shuffled labels, {site}",
                    f"{min(lengths):.2f} to {max(lengths):.2f} of the length, cosine {min(cosines):.2f} to "
                    f"{max(cosines):.2f}",
                    f"{len(mixed)} fits with nothing left to learn; a length far below 1 is wanted",
                )
            )
    if not evidence.has_effect:
        return rows
    measured = evidence.suggested[evidence.curve.effect]
    baseline = measured.estimate.mean - (0.0 if measured.change is None else measured.change.mean)
    at = f"at strength {evidence.strength:g}"
    for name, values in (("random directions", evidence.randoms), ("shuffled labels, same norm", evidence.shuffled)):
        if values:
            low, high = min(values) - baseline, max(values) - baseline
            what = f"change {signed(low)} to {signed(high)} {measured.column.unit}"
            count = "1 draw" if len(values) == 1 else f"{len(values)} draws"
            rows.append((f"{name}, {at}", what, f"{count}, against {signed(measured.effect.mean)} steered"))
    return rows


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:g}"


def _json(content: Any) -> str:
    return "" if content is None else json.dumps(content, indent=2, ensure_ascii=False)
