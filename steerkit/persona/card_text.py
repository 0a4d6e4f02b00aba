"""TODO persona.card_text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from steerkit.persona.choice_text import tried_text, way_text
from steerkit.persona.filtering import Filtered
from steerkit.persona.scores import Scores
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.persona.pipeline import Pipeline

__all__ = ["about_trait", "watching"]


def about_trait(pipeline: Pipeline, vector: SteeringVector, verdict: str, kept: Filtered, scores: Scores) -> str:
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


def watching(file: Path, monitor: SteeringVector) -> str:
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
