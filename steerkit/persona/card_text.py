"""The card of a persona vector: the facts of any vector, and how this one came from the description of a trait."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from steerkit._support.files import write_whole
from steerkit.errors import DataError
from steerkit.generation import generate
from steerkit.methods._registry import example_strength
from steerkit.persona.choice_text import tried_text, way_text
from steerkit.persona.filtering import Filtered
from steerkit.persona.scores import Scores
from steerkit.report.card import Answer, vector_card
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.persona.pipeline import Pipeline

__all__ = ["write_card"]

QUESTIONS = 2
"""Held-out questions answered on the card."""


def write_card(
    pipeline: Pipeline, vector: SteeringVector, monitor: SteeringVector, verdict: str, kept: Filtered, scores: Scores
) -> Path:
    """Write the card, with answers before and after; one that is there of the same vectors stays.

    Args:
        pipeline: the extraction.
        vector: to steer with.
        monitor: the vector to watch with.
        verdict: how the layer was chosen.
        kept: which pairs were kept.
        scores: of the pairs.

    Returns:
        Where the card is.

    Raises:
        DataError: it cannot be written.
    """
    path = pipeline.file.with_suffix(".md")
    marks = [f"vector digest | `{vector.digest[:16]}`", f"digest `{monitor.digest[:16]}`"]
    if path.exists() and all(mark in path.read_text(encoding="utf-8") for mark in marks):
        return path
    answers = _answers(pipeline, vector)
    text = vector_card(
        pipeline.file.stem, vector, curve=None, answers=answers, new_tokens=pipeline.choice.max_new_tokens
    )
    try:
        more = _about_trait(pipeline, vector, verdict, kept, scores) + _watching(pipeline.monitor_file, monitor)
        write_whole(path, (text + more).encode())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    return path


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


def _about_trait(pipeline: Pipeline, vector: SteeringVector, verdict: str, kept: Filtered, scores: Scores) -> str:
    """What the card says about the way to the vector."""
    spec, plan = pipeline.spec, pipeline.plan
    drawn = "greedy" if plan.samples == 1 else f"{plan.samples} samples each at temperature 1, seed {plan.seed}"
    lines = ["", "## From the description to the vector", "", f"Trait: {spec.trait}. {spec.description}".rstrip(), ""]
    lines.append(
        f"Rollouts: {len(spec.instructions)} pairs of instructions, {len(spec.extraction_questions)} extraction and "
        f"{len(spec.held_out_questions)} held-out questions, {drawn}, at most {plan.max_new_tokens} tokens."
    )
    if pipeline.folded:
        lines += ["", "The chat template has no system turn: system prompts stood before the question."]
    lines += ["", way_text(scores.judge, pipeline.rules), "", f"{kept.sentence()}."]
    lines += ["", f"Layer and strength: {verdict}."]
    return "\n".join([*lines, *tried_text(vector)]) + "\n"


def _watching(file: Path, monitor: SteeringVector) -> str:
    """The vector to watch with."""
    found = monitor.extra["watchpoint"]
    areas = []
    for what, kind in (("neutral ones", "neutral"), ("the opposite", "negative")):
        areas.append("{mean:.2f} ({low:.2f} to {high:.2f}) against ".format(**found[kind]) + what)
    lines = ["", "## To watch the trait", ""]
    lines.append(
        f"`{file.name}` (`{monitor.sites[0]}`, digest `{monitor.digest[:16]}`) is read at a prompt's last token, "
        f"before any answer. Area under the curve of {found['prompts']} held-out prompts of the trait: "
        f"{', '.join(areas)}."
    )
    lines += ["", f'    steerkit monitor "PROMPT" --vector {file.name}']
    return "\n".join(lines) + "\n"
