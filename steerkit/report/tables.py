"""Tables and sentences of a report: what the vector is, what it costs, what its controls gave."""

from __future__ import annotations

from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.scoring import Measured
from steerkit.report.evidence import Evidence
from steerkit.report.figures_text import signed
from steerkit.report.heat_cells import cell, given

__all__ = ["control_rows", "costs_words", "fact_rows"]


def costs_words(evidence: Evidence) -> str:
    """What steering costs at the suggested strength."""
    found = evidence.suggested
    return (
        f"Costs at strength {evidence.strength:g}: KL divergence {cell(found['kl'].effect, '.3g')} nats per token and "
        f"perplexity ratio {cell(found['perplexity_ratio'].effect, '.3g')} on {found['kl'].items} neutral texts. In "
        f"{found['repetition'].items} generated texts the share of repeated 4-grams is "
        f"{100 * found['repetition'].estimate.mean:.0f} %, a change of {_points(found['repetition'])}, and the length "
        f"{found['words'].estimate.mean:.3g} words, a change of {_change(found['words'], '+.3g')}."
    )


def _points(share: Measured) -> str:
    """The change of a share, in points, so that nobody takes it for the share."""
    if share.change is None:
        return "0 points"
    return f"{cell(Estimate(*(100 * end for end in share.change)), '+.1f')} points"


def _change(measured: Measured, form: str) -> str:
    """A change against the unsteered model; of the unsteered model itself there is none."""
    return "+0" if measured.change is None else cell(measured.change, form)


def fact_rows(evidence: Evidence) -> list[tuple[str, str]]:
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


def control_rows(evidence: Evidence) -> list[tuple[str, str, str]]:
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
    if measured.wrong_way is not None:
        asked = measured.items + measured.failures
        what = f"{measured.wrong_way:.0%} of {asked} items"
        rows.append(
            (f"moved the wrong way, {at}", what, "against the sign of the strength, or not to be scored; 0 is wanted")
        )
    return rows
