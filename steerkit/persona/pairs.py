"""Rollouts that were kept, as contrast sets: to extract from, to choose on and to confirm on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerkit._support.files import write_whole
from steerkit.errors import DataError
from steerkit.persona.filtering import UNENDED, Filtered
from steerkit.persona.rollout_plan import SIDES
from steerkit.persona.rollouts import Rollout
from steerkit.persona.traits import TraitSpec
from steerkit.prompts.contrast_set import ContrastSet

__all__ = ["contrast_sets", "pairs_jsonl"]


def pairs_jsonl(spec: TraitSpec, rows: Sequence[Rollout], *, folded: bool = False) -> str:
    """Rollouts as the lines of a contrast set, the rows of held-out questions marked.

    A line has the question, both system prompts and both answers. Where there is no system turn, lines to extract from
    have two prompts instead of one, and held-out lines the question without a system prompt: both answers have to
    follow the same prompt for one to be preferred.

    Args:
        spec: of the trait.
        rows: what is kept.
        folded: the system prompt is written before the question.
    """
    lines = []
    for row in rows:
        asked = row.asked
        answers: dict[str, Any] = {side: row.answer(side) for side in SIDES}
        line: dict[str, Any] = {"id": f"question-{asked.question}-instruction-{asked.instruction}-{asked.sample}"}
        if folded and not asked.held_out:
            for side in SIDES:
                turn = asked.conversation(spec, side, folded=True).prompt
                line[side] = [{"role": "user", "content": turn}, {"role": "assistant", "content": answers[side]}]
        else:
            line |= {"prompt": spec.questions[asked.question], **answers}
            if not folded:
                line["system"] = {side: spec.system_prompt(asked.instruction, side) for side in SIDES}
        lines.append(json.dumps({**line, "held_out": asked.held_out}, ensure_ascii=False) + "\n")
    return "".join(lines)


def contrast_sets(
    spec: TraitSpec, rollouts: Sequence[Rollout], kept: Filtered, folder: Path, *, folded: bool
) -> tuple[ContrastSet, ContrastSet | None, ContrastSet | None]:
    """The kept rows as contrast sets: to extract from, to choose on and to confirm on.

    Args:
        spec: of the trait.
        rollouts: all rows.
        kept: which of them are kept.
        folder: where `pairs.jsonl` goes.
        folded: the system prompt is written before the question.

    Returns:
        The three sets; None in the place of one without a pair.

    Raises:
        DataError: nothing is left to extract from, or the file cannot be written.
    """
    rows = [rollouts[place] for place in kept.kept]
    if not any(not row.asked.held_out for row in rows):
        thinks = "; to answer without thinking first, give --no-thinking" if UNENDED in kept.reasons else ""
        raise DataError(
            f"{spec.trait}: no pair of answers to the extraction questions survives ({kept.sentence()}); read "
            f"{folder / 'rollouts.jsonl'}, then change the instructions, the model or --max-new-tokens{thinks}"
        )
    path = folder / "pairs.jsonl"
    try:
        write_whole(path, pairs_jsonl(spec, rows, folded=folded).encode())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    read = ContrastSet.from_jsonl(path)
    asked = [row.asked for row in rows]
    # Neighbouring questions to different halves: what two instructions drew from one question stays together.
    halves = [question.question % 2 if question.held_out else None for question in asked]
    train, choosing, confirming = (_pairs_taken(read, [half is wanted for half in halves]) for wanted in (None, 0, 1))
    assert train is not None
    return train, choosing, confirming


def _pairs_taken(data: ContrastSet, wanted: Sequence[bool]) -> ContrastSet | None:
    """Some pairs of a contrast set; None where there are none."""
    places = [place for place, take in enumerate(wanted) if take]
    if not places:
        return None
    positive, negative = (tuple(side[place] for place in places) for side in (data.positive, data.negative))
    return replace(data, positive=positive, negative=negative, marks=())
