"""What a card says of effect and cost: verdict, costs, operating range, what else moves, how the strength was found.

From the calibration that the vector's file holds, and from what was measured on generated text (`steerkit evidence`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerkit.export.weights_card import number
from steerkit.network.sites import layers_text
from steerkit.vector.description import strength_source
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["calibration_lines", "evidence_rows", "verdict_line"]

_VERDICTS = {"shows": "Shows", "weak": "Weak", "nothing": "Nothing"}
_COSTS = (("kl", "KL divergence", "nats per token"), ("perplexity_ratio", "perplexity ratio", ""))
_BUDGET = {"kl": "max_kl", "perplexity_ratio": "max_ppl_ratio", "repetition": "max_repetition"}


def verdict_line(vector: SteeringVector, entry: Mapping[str, Any] | None) -> str:
    """The verdict in one line.

    Args:
        vector: the vector.
        entry: what was measured of it on generated text; None where nothing was.
    """
    facts = vector.calibration
    found = f" On held-out pairs: {facts['verdict']}." if "verdict" in facts else ""
    if entry is None:
        if facts.get("by") == "calibrate" and vector.suggested_strength is None:
            return f"**Nothing.** Calibration confirmed no effect, so no strength is suggested.{found}"
        return f"**Not measured on generated text.**{found}"
    where = f"in generated text at strength {entry['strength']:g}"
    said = _VERDICTS[entry["verdict"]] if entry.get("told", True) else "Cannot be told"
    return f"**{said}** {where}{_moved(entry)}{_judged(entry.get('judged_by', {}))}.{found}"


def evidence_rows(vector: SteeringVector, entry: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Rows of the card's table: costs, operating range, suggested strength, what else moves.

    Args:
        vector: the vector.
        entry: what was measured of it on generated text; None where nothing was.
    """
    suggested, found = vector.suggested_strength, vector.held_out.get("calibration") or {}
    strength = "none" if suggested is None else f"{suggested:g} ({vector.unit} unit), {strength_source(vector)}"
    rows = [("suggested strength", strength), ("costs there", _costs(found.get("confirmation") or {}, entry))]
    if suggested is None:
        rows.pop()
    span = _range(found)
    rows += [("operating range", span)] if span else []
    moved = "not measured" if entry is None else ", ".join(map(_trait, entry.get("also_moves", ()))) or "no other trait"
    return [*rows, ("also moves", moved)]


def calibration_lines(vector: SteeringVector, *, with_curve: bool = True) -> list[str]:
    """How the strength was found, as tables; nothing where the file holds no calibration.

    Args:
        vector: with its calibration in it.
        with_curve: whether the effect by strength on the held-out items is shown too.
    """
    found = vector.held_out.get("calibration")
    if not found:
        return []
    lines = ["", "## How the strength was found", "", f"Chosen by `{found['effect']}` on items kept from fitting:", ""]
    lines += ["| layers | strength | change (95 %) | KL | perplexity ratio | repetition |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for row in found["validation"]:
        scores = row["scores"]
        effect, kl, ratio = (scores.get(name, {}) for name in (found["effect"], "kl", "perplexity_ratio"))
        where = layers_text(sorted(row["layers"]))
        lines.append(
            f"| {where} | {row['strength']:g} | {_span(effect)} | {number(kl.get('mean'), 2)} "
            f"| {number(ratio.get('mean'), 2)} | {number(scores.get('repetition', {}).get('change'), 2)} |"
        )
    lines += ["", f"Then, once: {found['verdict']}."]
    return lines + (_curve_lines(found) if with_curve and found["curve"] else [])


def _curve_lines(found: Mapping[str, Any]) -> list[str]:
    """The effect by strength on the held-out items."""
    title = found["effect"].replace("_", " ")
    items = found["confirmation"][found["effect"]]["items"]
    lines = ["", "## Effect", "", f"{title[:1].upper()}{title[1:]} on {items} held-out items:", ""]
    lines += ["| strength | effect | 95 % interval | random directions, same norm |", "| --- | --- | --- | --- |"]
    for row in found["curve"]:
        reached = f"{min(row['random']):.2f} to {max(row['random']):.2f}" if row["random"] else "-"
        ends = " to ".join("-" if end is None else f"{end:.3f}" for end in (row["low"], row["high"]))
        lines.append(f"| {row['strength']:g} | {row['effect']:.3f} | {ends} | {reached} |")
    return lines


def _judged(by: Mapping[str, Any]) -> str:
    """What found the concept in the answers, and how often it is right."""
    if "accuracy" not in by:
        return ""
    title, on = by.get("classifier", ""), by.get("measured_on", "answers")
    what = title if title.startswith("the scorer") else "a classifier"
    return f", judged by {what}, right on {by['accuracy']['mean']:.0%} of {'' if on[:1].isdigit() else 'held-out '}{on}"


def _moved(entry: Mapping[str, Any]) -> str:
    """Concept and overall score without and with steering, and under a system prompt."""
    texts = entry.get("texts", {})
    if not {"0", "+"} <= set(texts):
        return ""
    parts = []
    for name in ("concept", "overall"):
        before, after = (texts[at][name] for at in ("0", "+"))
        part = f"{name} {before['mean']:.2f} to {after['mean']:.2f}"
        change = entry.get("change", {}).get(name)
        part += "" if change is None else f" (change {change['low']:+.2f} to {change['high']:+.2f})"
        part += f", {texts['prompt'][name]['mean']:.2f} under a system prompt" if "prompt" in texts else ""
        parts.append(part)
    return f": {'; '.join(parts)}"


def _costs(confirmed: Mapping[str, Any], entry: Mapping[str, Any] | None) -> str:
    """KL, perplexity ratio and repetition on texts that nothing was chosen on."""
    said = []
    for name, title, unit in _COSTS:
        found = confirmed.get(name) or (entry or {}).get(name)
        said.append(f"{title} not measured" if found is None else f"{title} {_figure(found, '.3g')} {unit}".rstrip())
    rise = confirmed.get("repetition")
    if rise is not None and "change" in rise:
        own = {"mean": rise["change"], "low": rise["change_low"], "high": rise["change_high"]}
        said.append(f"repeated 4-grams {_figure(own, '+.3g')} against the unsteered model")
    else:
        share = (entry or {}).get("repetition")
        said.append("repetition not measured" if share is None else f"repeated 4-grams {_figure(share, '.3g')}")
    return "; ".join(said)


def _range(found: Mapping[str, Any]) -> str:
    """Strengths at the chosen layers that stayed inside the budget, and the first that did not."""
    rows = [row for row in found.get("validation", ()) if list(row["layers"]) == list(found.get("layers", ()))]
    if not rows:
        return ""
    inside = [row["strength"] for row in rows if not _broken(row, found["budget"])]
    outside = [row for row in rows if _broken(row, found["budget"])]
    said = "no strength is inside the budget"
    if inside:
        said = f"up to {max(inside, key=abs):g}, the strongest tried inside the budget"
    if outside:
        first = min(outside, key=lambda row: abs(row["strength"]))
        said += f"; {first['strength']:g} is outside ({', '.join(_broken(first, found['budget']))})"
    budget = found["budget"]
    return (
        f"{said}. Budget: KL {budget['max_kl']:g}, perplexity ratio {budget['max_ppl_ratio']:g}, "
        f"repetition +{budget['max_repetition']:g}"
    )


def _broken(row: Mapping[str, Any], budget: Mapping[str, float]) -> list[str]:
    """Costs of a point that exceed the budget, in words."""
    found = []
    for name, limit in _BUDGET.items():
        score = row["scores"].get(name)
        cost = None if score is None else score.get("change", score["mean"])
        if cost is not None and not cost <= budget[limit]:
            found.append(f"{name.replace('_', ' ')} {cost:.3g}")
    return found


def _trait(found: Mapping[str, Any]) -> str:
    return f"{found['trait']} {_figure(found, '+.2f')}"


def _figure(found: Mapping[str, Any], form: str) -> str:
    """A mean with its interval."""
    low, high = found.get("low"), found.get("high")
    ends = "" if low is None or high is None else f" ({low:{form}} to {high:{form}})"
    return f"{found['mean']:{form}}{ends}"


def _span(row: Mapping[str, Any]) -> str:
    """A change with its interval."""
    if "change" not in row:
        return "-"
    ends = ("-" if row.get(end) is None else f"{row[end]:+.2f}" for end in ("change_low", "change_high"))
    return f"{row['change']:+.2f} ({' to '.join(ends)})"
