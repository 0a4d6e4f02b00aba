"""A card beside a vector or beside weights made of it: what it is, where it came from, in a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from steerkit.evaluate.curve import Curve
from steerkit.evaluate.kinds import Kind
from steerkit.export.likeness import Likeness
from steerkit.models import hub_id
from steerkit.registry import default_strength, example_strength, is_gated
from steerkit.vector import SteeringVector, model_facts

__all__ = ["Answer", "vector_card", "weights_card"]


_NOT_MEASURED = ", as was asked for here; what was measured of the vector was measured with its own scope"


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
    curve: Curve | None,
    kinds: Sequence[Kind] = (),
    answers: Sequence[Answer],
    new_tokens: int,
) -> str:
    """Write the card of a vector.

    Args:
        name: of the vector, without ending.
        vector: the vector.
        curve: its dose-response on held-out items, where it was measured.
        kinds: what it does to either kind of prompts, where that was measured.
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
        f"with steerkit.steer(model, vector, strength={example_strength(vector):g}):",
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
    lines += _separation_lines(vector, measured)
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
    lines += _gate_lines(vector) + _kind_lines(kinds)
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


def _separation_lines(vector: SteeringVector, measured: Mapping[str, Mapping[str, float]]) -> list[str]:
    """On how many items the separation was measured, and the figures of sites that are only read."""
    if not measured:
        return []
    on = f"on {vector.held_out['items']} items the vector was not fitted on"
    if any(str(site) in measured for site in vector.sites):
        return ["", f"Separation measured {on}."]
    figures = ", ".join(
        f"`{site}` AUC {_number(one.get('auc'), 3)}, Cohen's d {_number(one.get('cohens_d'), 2)}"
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
    for name, value in told.items():
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
        lines.append(f"| {kind.side} side | {kind.items} | {shares} |")
    return lines


def weights_card(
    name: str,
    model: nn.Module,
    vectors: Sequence[SteeringVector],
    strength: float | None,
    likeness: Likeness,
    facts: Mapping[str, str],
    use: str,
    *,
    library: str = "transformers",
) -> str:
    """Write the card of a checkpoint or adapter that holds vectors.

    Args:
        name: of the folder.
        model: what it was made of.
        vectors: what is in it.
        strength: as it was given.
        likeness: how far it is from the hooks.
        facts: further rows of its table.
        use: how to load it; `{name}` stands for the name.
        library: what loads it.

    Returns:
        Markdown.
    """
    identity = model_facts(model)
    base = hub_id(identity["model_id"] or vectors[0].model_id or identity["model_type"])
    what = "a steering vector" if len(vectors) == 1 else f"{len(vectors)} steering vectors"
    methods = ", ".join(sorted({vector.method for vector in vectors}))
    lines = [
        "---",
        f"library_name: {library}",
        f"base_model: {base}",
        f"tags: [activation-steering, {methods}]",
        "---",
        "",
        f"# {name}",
        "",
        f"{base} with {what} in its weights, made by steerkit. The licence is that of the base model.",
        "",
        use.format(name=name),
        "",
        "| | |",
        "| --- | --- |",
    ]
    for vector in vectors:
        sites = ", ".join(f"`{site}`" for site in vector.sites[:4]) + (", ..." if len(vector.sites) > 4 else "")
        dose = vector.strength if vector.strength is not None else strength
        dose = default_strength(vector) if dose is None else dose
        lines += [
            f"| vector | `{vector.method}` ({vector.paper or 'no paper'}), digest `{vector.digest[:16]}` |",
            f"| sites | {sites} |",
            f"| strength | {dose:g} |",
            f"| tokens | every one{_NOT_MEASURED if vector.own_scope else ''} |",
        ]
    lines += [f"| {name} | {text} |" for name, text in facts.items()]
    lines += [
        f"| precision | {likeness.dtype} |",
        "",
        "## The same as hooks",
        "",
        f"Loaded again and compared with the base model steered by hooks on {likeness.rows} texts, {likeness.tokens} "
        f"tokens: {likeness.sentence()}. Steering itself moves the logits by {likeness.effect:.2g} relative.",
    ]
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
