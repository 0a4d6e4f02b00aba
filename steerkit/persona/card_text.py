"""The card of a persona vector: the facts of any vector, and how this one came from the description of a trait."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from steerkit._support.files import write_whole
from steerkit.errors import DataError
from steerkit.generation import generate
from steerkit.methods._registry import example_strength
from steerkit.model import weights_of
from steerkit.network.decoder import inner_model
from steerkit.persona.choice_text import way_text
from steerkit.persona.filtering import Rules, counts_text
from steerkit.persona.traits import TraitSpec
from steerkit.report.card import Answer, vector_card
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.persona.pipeline import Pipeline

__all__ = ["trait_text", "write_card"]

QUESTIONS = 2
"""Held-out questions answered on the card."""


def write_card(pipeline: Pipeline, vector: SteeringVector, monitor: SteeringVector) -> Path:
    """Write the card, with answers before and after; one that is there of the same vectors stays.

    Args:
        pipeline: the extraction.
        vector: to steer with.
        monitor: the vector to watch with.

    Returns:
        Where the card is.

    Raises:
        DataError: it cannot be written.
    """
    path = pipeline.file.with_suffix(".md")
    marks = [f"vector digest | `{vector.digest[:16]}`", f"digest `{monitor.digest[:16]}`"]
    if path.exists() and all(mark in path.read_text(encoding="utf-8") for mark in marks):
        return path
    text = vector_card(
        pipeline.file.stem,
        vector,
        answers=_answers(pipeline, vector),
        new_tokens=pipeline.choice.max_new_tokens,
        weights=str(weights_of(inner_model(pipeline.model))),
    )
    try:
        write_whole(path, (text + trait_text(pipeline.spec, vector, pipeline.monitor_file.name, monitor)).encode())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    return path


def trait_text(spec: TraitSpec, vector: SteeringVector, monitor_name: str, monitor: SteeringVector) -> str:
    """What the card says of the way from the description to the vector, and of the vector to watch with.

    Args:
        spec: of the trait.
        vector: to steer with; its file says how its pairs were made and filtered.
        monitor_name: the file of the vector to watch with.
        monitor: the vector to watch with.
    """
    about = vector.extra["persona"]
    plan, rules = about["plan"], Rules(**about["rules"])
    drawn = "greedy"
    if plan["samples"] > 1:
        drawn = f"{plan['samples']} samples each at temperature 1, seed {plan['seed']}"
    lines = ["", "## From the description to the vector", "", f"Trait: {spec.trait}. {spec.description}".rstrip(), ""]
    lines.append(
        f"Rollouts: {len(spec.instructions)} pairs of instructions, {len(spec.extraction_questions)} extraction and "
        f"{len(spec.held_out_questions)} held-out questions, {drawn}, at most {plan['max_new_tokens']} tokens."
    )
    if not about["system_turn"]:
        lines += ["", "The chat template has no system turn: system prompts stood before the question."]
    kept = counts_text(about["kept"], about["rows"], about["dropped"])
    lines += ["", way_text(about["judge"], rules), "", f"{kept}.", "", f"Layer and strength: {about['verdict']}."]
    found, areas = monitor.extra["watchpoint"], []
    for what, kind in (("neutral ones", "neutral"), ("the opposite", "negative")):
        areas.append("{mean:.2f} ({low:.2f} to {high:.2f}) against ".format(**found[kind]) + what)
    lines += ["", "## To watch the trait", ""]
    lines.append(
        f"`{monitor_name}` (`{monitor.sites[0]}`, digest `{monitor.digest[:16]}`) is read at a prompt's last token, "
        f"before any answer. Area under the curve of {found['prompts']} held-out prompts of the trait: "
        f"{', '.join(areas)}."
    )
    return "\n".join([*lines, "", f'    steerkit monitor "PROMPT" --vector {monitor_name}']) + "\n"


def _answers(pipeline: Pipeline, vector: SteeringVector) -> list[Answer]:
    """A few held-out questions, answered against, without and with the trait."""
    own = example_strength(vector)
    asked = [(question, by * own) for question in pipeline.spec.held_out_questions[-QUESTIONS:] for by in (-1, 0, 1)]
    texts = generate(
        pipeline.model,
        pipeline.tokenizer,
        [question for question, _ in asked],
        vector=vector,
        strength=[strength for _, strength in asked],
        max_new_tokens=pipeline.choice.max_new_tokens,
        batch_size=pipeline.batch_size,
        chat_template_kwargs=pipeline.plan.chat_template_kwargs,
    )
    return [Answer(question, strength, text) for (question, strength), text in zip(asked, texts, strict=True)]
