"""Rollouts that were kept as the lines of a contrast set, one line per question, instruction and sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from steerkit.persona.rollout_plan import SIDES
from steerkit.persona.rollouts import Rollout
from steerkit.persona.traits import TraitSpec

__all__ = ["pairs_jsonl"]


def pairs_jsonl(spec: TraitSpec, rows: Sequence[Rollout], *, folded: bool = False) -> str:
    """Rollouts as the lines of a contrast set, the rows of held-out questions marked.

    A line has the question, both system prompts and both answers. Where there is no system turn, lines to extract from
    have two prompts instead of one, and held-out lines the baseline question: both answers have to follow the same prompt
    for one to be preferred.

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
