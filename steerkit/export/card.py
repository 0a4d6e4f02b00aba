"""A card beside a vector file: what it is, where it came from, what it does, in a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from steerkit.evaluate.curve import Curve
from steerkit.models import hub_id
from steerkit.vector import SteeringVector

__all__ = ["Answer", "vector_card"]


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
    name: str, vector: SteeringVector, *, curve: Curve | None, answers: Sequence[Answer], new_tokens: int
) -> str:
    """Write the card of a vector.

    Args:
        name: of the vector, without ending.
        vector: the vector.
        curve: its dose-response on held-out items, where it was measured.
        answers: texts before and after, greedy.
        new_tokens: how long the answers were allowed to be.

    Returns:
        Markdown.
    """
    facts = vector.describe()
    suggested = vector.suggested_strength
    readout = f"`{vector.readout}`" if vector.readout else "reads for itself"
    lines = [
        "---",
        "library_name: steerkit",
        f"base_model: {hub_id(vector.model_id or vector.model_type)}",
        f"tags: [activation-steering, {vector.method}]",
        "license: apache-2.0",
        "---",
        "",
        f"# {name}",
        "",
        f"A `{vector.method}` vector ({vector.paper or 'no paper'}) for {vector.model_id or vector.model_type}.",
        "",
        "```python",
        f'vector = steerkit.SteeringVector.load("{name}.safetensors")',
        f"with steerkit.steer(model, vector, strength={1.0 if suggested is None else suggested:g}):",
        "    model.generate(...)",
        "```",
        "",
        "| | |",
        "| --- | --- |",
        f"| sites | {', '.join(f'`{site}`' for site in vector.sites)} |",
        f"| scope, readout | `{vector.scope}`, {readout} |",
        f"| suggested strength | {'none' if suggested is None else f'{suggested:g}'} ({vector.unit} unit) |",
        f"| model | {vector.model_type}, {vector.num_layers} blocks, width {vector.hidden_size} |",
        f"| data | {vector.data_source or '-'}, digest `{(vector.data_digest or '-')[:16]}` |",
        f"| vector digest | `{vector.digest[:16]}` |",
        "",
        "## Sites",
        "",
        "| site | length of the direction | typical activation norm | held-out AUC | Cohen's d |",
        "| --- | --- | --- | --- | --- |",
    ]
    measured = dict(vector.held_out.get("sites", {}))
    for entry in facts["sites"]:
        site = entry["site"]
        figures = measured.get(site, {})
        length, norm = entry.get("direction_norm"), entry.get("activation_norm")
        lines.append(
            f"| `{site}` | {_number(length)} | {_number(norm)} | {_number(figures.get('auc'), 3)} "
            f"| {_number(figures.get('cohens_d'), 2)} |"
        )
    if measured:
        lines += ["", f"Separation measured on {vector.held_out['items']} items the vector was not fitted on."]
    if curve is not None:
        column = curve.points[0][curve.effect].column
        title = f"{column.title[:1].upper()}{column.title[1:]}"
        lines += ["", "## Effect", "", f"{title} on {curve.items} held-out items, {column.unit}:", ""]
        lines += [
            "| strength | effect | 95 % interval | random directions, same norm |",
            "| --- | --- | --- | --- |",
        ]
        for row in curve.as_rows():
            randoms = f"{min(row['random']):.2f} to {max(row['random']):.2f}" if row["random"] else "-"
            lines.append(
                f"| {row['strength']:g} | {row['effect']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {randoms} |"
            )
    if answers:
        lines += ["", "## Before and after", "", f"Greedy, {new_tokens} new tokens."]
        for prompt in dict.fromkeys(answer.prompt for answer in answers):
            lines += ["", f"**{prompt}**", ""]
            lines += [
                f"- strength {answer.strength:g}: {' '.join(answer.text.split())}"
                for answer in answers
                if answer.prompt == prompt
            ]
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
