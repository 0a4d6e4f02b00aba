"""A card beside a vector or beside weights made of it: what it is, where it came from, in a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from steerkit.evaluate.by_prompt_kind import Kind, opened_rows
from steerkit.evaluate.curve import Curve
from steerkit.evaluate.scorers.refusal import stated_accuracy
from steerkit.export.weights_card import number
from steerkit.methods._registry import example_strength, is_gated
from steerkit.model import hub_id
from steerkit.network.sites import sites_text
from steerkit.report.card_evidence import calibration_lines, evidence_rows, verdict_line
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Answer", "vector_card"]


_NAMED = 8  # sites that a card names one by one


class Answer(NamedTuple):
    """One prompt answered without and with steering.

    Attributes:
        prompt: what was asked.
        strength: at which it was answered.
        text: the answer.
    """

    prompt: str
    strength: float
    text: str


def vector_card(
    name: str,
    vector: SteeringVector,
    *,
    curve: Curve | None = None,
    kinds: Sequence[Kind] = (),
    answers: Sequence[Answer] = (),
    new_tokens: int = 0,
    weights: str | None = None,
    entry: Mapping[str, Any] | None = None,
) -> str:
    """Write the card of a vector.

    Args:
        name: of the vector, without ending.
        vector: the vector.
        curve: its effect by strength on held-out items, where it was measured; else that in the file is shown.
        kinds: what it does to either kind of prompts, where that was measured.
        answers: texts before and after, greedy.
        new_tokens: how long the answers were allowed to be.
        weights: which weights it was made on, in words: their quantisation and digest.
        entry: what was measured of it on generated text (`steerkit evidence`); one of another vector does not count.

    Returns:
        Markdown.
    """
    known = entry if entry is not None and entry["digest"] == vector.digest else None
    lines = _head_lines(name, vector, weights, known) + _site_lines(vector)
    lines += calibration_lines(vector, with_curve=curve is None)
    if curve is not None:
        lines += _effect_lines(curve)
    lines += _gate_lines(vector) + _kind_lines(kinds)
    if answers:
        lines += _answer_lines(answers, new_tokens)
    return "\n".join(lines) + "\n"


def _head_lines(name: str, vector: SteeringVector, weights: str | None, entry: Mapping[str, Any] | None) -> list[str]:
    """Metadata, the verdict, how to use it, and a table of facts."""
    model = vector.model_id or vector.model_type
    made = "" if weights is None else f" ({weights})"
    readout = f"`{vector.readout}`" if vector.readout else "reads for itself"
    return [
        "---",
        "library_name: steerkit",
        f"base_model: {hub_id(model)}{'' if weights is None else f'  # not as it stands there, but as {weights}'}",
        f"tags: [activation-steering, {vector.method}]",
        "license: apache-2.0",
        "---",
        "",
        f"# {name}",
        "",
        verdict_line(vector, entry),
        "",
        f"A `{vector.method}` vector ({vector.paper or 'no paper'}) for {model}{made}.",
        "",
        "```python",
        f'vector = steerkit.SteeringVector.load("{name}.safetensors")',
        f"with steerkit.steer(model, vector, strength={example_strength(vector):g}):",
        "    model.generate(...)",
        "```",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {what} | {words} |" for what, words in evidence_rows(vector, entry)),
        f"| sites | {_sites(vector)} |",
        f"| scope, readout | `{vector.scope}`, {readout} |",
        f"| model | {vector.model_type}, {vector.num_layers} blocks, width {vector.hidden_size} |",
        f"| weights | {weights or 'not recorded'} |",
        f"| data | {vector.data_source or '-'}, digest `{(vector.data_digest or '-')[:16]}` |",
        f"| vector digest | `{vector.digest[:16]}` |",
    ]


def _sites(vector: SteeringVector) -> str:
    """Where the vector acts: every site by name, or of many the blocks by kind."""
    if len(vector.sites) > _NAMED:
        return sites_text(map(str, vector.sites))
    return ", ".join(f"`{site}`" for site in vector.sites)


def _site_lines(vector: SteeringVector) -> list[str]:
    """Every site with its direction's length and its separation of held-out items."""
    lines = [
        "",
        "## Sites",
        "",
        "| site | length of the direction | typical activation norm | held-out AUC | Cohen's d |",
        "| --- | --- | --- | --- | --- |",
    ]
    measured = dict(vector.held_out.get("sites", {}))
    for entry in vector.describe()["sites"]:
        site = entry["site"]
        figures = measured.get(site, {})
        length, norm = entry.get("direction_norm"), entry.get("activation_norm")
        lines.append(
            f"| `{site}` | {number(length)} | {number(norm)} | {number(figures.get('auc'), 3)} "
            f"| {number(figures.get('cohens_d'), 2)} |"
        )
    return lines + _separation_lines(vector, measured)


def _effect_lines(curve: Curve) -> list[str]:
    """The effect at every strength, beside random directions."""
    column = curve.points[0][curve.effect].column
    title = f"{column.title[:1].upper()}{column.title[1:]}"
    lines = ["", "## Effect", "", f"{title} on {curve.items} held-out items, {column.unit}:", ""]
    lines += [
        "| strength | effect | 95 % interval | random directions, same norm |",
        "| --- | --- | --- | --- |",
    ]
    for row in curve.as_rows():
        randoms = f"{min(row['random']):.2f} to {max(row['random']):.2f}" if row["random"] else "-"
        lines.append(
            f"| {row['strength']:g} | {row['effect']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {randoms} |"
        )
    return lines


def _answer_lines(answers: Sequence[Answer], new_tokens: int) -> list[str]:
    """Every prompt with its answers, by strength."""
    lines = ["", "## Before and after", "", f"Greedy, {new_tokens} new tokens."]
    for prompt in dict.fromkeys(answer.prompt for answer in answers):
        lines += ["", f"**{prompt}**", ""]
        lines += [
            f"- strength {answer.strength:g}: {' '.join(answer.text.split())}"
            for answer in answers
            if answer.prompt == prompt
        ]
    return lines


def _separation_lines(vector: SteeringVector, measured: Mapping[str, Mapping[str, float]]) -> list[str]:
    """On how many items the separation was measured, and the figures of sites that are only read."""
    if not measured:
        return []
    on = f"on {vector.held_out['items']} items the vector was not fitted on"
    if any(str(site) in measured for site in vector.sites):
        return ["", f"Separation measured {on}."]
    figures = ", ".join(
        f"`{site}` AUC {number(one.get('auc'), 3)}, Cohen's d {number(one.get('cohens_d'), 2)}"
        for site, one in measured.items()
    )
    return ["", f"Separation where it reads, measured {on}: {figures}."]


def _gate_lines(vector: SteeringVector) -> list[str]:
    """Where a gate reads, and how well it tells held-out prompts apart."""
    if not is_gated(vector):
        return []
    lines = ["", "## The gate", "", f"It reads {', '.join(f'`{site}`' for site in vector.reads)}."]
    told = vector.held_out.get("gate")
    if not told:
        return lines
    lines[-1] += f" On {vector.held_out['items']} held-out items of either kind:"
    lines += ["", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {text} |" for name, text in opened_rows(vector)]
    for name, value in told.items():
        if name == "opened" or ("opened" in told and name in ("tpr", "fpr")):  # these mix kinds of prompts
            continue
        text = ", ".join(f"{key} {one}" for key, one in value.items()) if isinstance(value, Mapping) else str(value)
        lines.append(f"| {name} | {text} |")
    return lines


def _kind_lines(kinds: Sequence[Kind]) -> list[str]:
    """What either kind of prompts got."""
    if not kinds:
        return []
    lines = ["", "## Effect", "", f"Answers to held-out prompts at strength {kinds[0].strength:g}, percent:", ""]
    lines += ["| prompts | | refused without | refused | unchanged |", "| --- | --- | --- | --- | --- |"]
    for kind in kinds:
        shares = " | ".join(
            f"{100 * share.mean:.0f} ({100 * share.low:.0f} to {100 * share.high:.0f})"
            for share in (kind.before, kind.refused, kind.unchanged)
        )
        name = f"{kind.side} side" if kind.side in ("positive", "negative") else f"negative side, {kind.side}"
        lines.append(f"| {name} | {kind.items} | {shares} |")
    return [*lines, "", f"Refusals are counted by wording: {stated_accuracy()}."]
