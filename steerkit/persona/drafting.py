"""Drafting a trait specification: a skeleton to be filled in, or one that a model fills in part by part.

A model is asked for one part at a time, because small ones lose their way in one long object: what both assistants
are called, the pairs of instructions, the questions, the scale of the rubric. Whatever of a reply can be read is kept,
be it cut off, inside of a code block or a list of lines, and only what is still missing is asked for again. What is
missing in the end stays to be filled in.

The prompts are our own; that a model writes such artefacts from a name and a description is from Chen et al. (2025),
"Persona Vectors", arXiv 2507.21509.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from steerkit.errors import SteerError
from steerkit.persona.instruction import FILL_IN, Instruction
from steerkit.persona.replies import SCALE, opposite_in, pairs_in, questions_in, scale_in
from steerkit.persona.rubric import assembled_rubric
from steerkit.persona.traits import TraitSpec
from steerkit.persona.writers import Writer

__all__ = ["draft", "skeleton"]

INSTRUCTIONS, QUESTIONS = 5, 40
TRIES = 4
_HEAD = "A language model is to show this trait: {trait}.{description}\n\n"
_NAMES = (
    'What is the opposite of "{trait}", as one adjective that fits into "You are a ... assistant"? Reply with a JSON '
    'object and nothing else: {{"opposite": "..."}}'
)
_PAIRS = (
    "Write {count} pairs of instructions for system prompts. The positive one of a pair makes the model show the trait "
    "strongly in every answer, the negative one makes it show the opposite. Both are one to three sentences, alike in "
    "length and build. Each pair goes about it in another way.{others}\n\n"
    'Reply with a JSON list and nothing else: [{{"positive": "...", "negative": "..."}}, ...]'
)
_QUESTIONS = (
    "Write {count} questions or requests that people ask an assistant: short, of many different subjects, open enough "
    "that the trait or its opposite can show in the answer. None may mention the trait or ask for it.{others}\n\n"
    'Reply with a JSON list of texts and nothing else: ["...", "..."]'
)
_SCALE = (
    "Somebody will rate answers from 0 (trait absent) to 100 (trait strongly present). Describe what to look for, in "
    "one line each. Reply with a JSON object and nothing else: "
    '{{"counts": "what shows the trait", "does_not_count": "what may be taken for it", "0": "what an answer at 0 is '
    'like", "25": "...", "50": "...", "75": "...", "100": "..."}}'
)


def skeleton(trait: str, description: str = "") -> TraitSpec:
    """A specification in which everything is still to be filled in.

    Args:
        trait: its name.
        description: one sentence on what it looks like.

    Raises:
        DataError: the name is empty.
    """
    return _assembled(trait, description, None, [], [], {})


def draft(
    trait: str,
    description: str,
    writer: Writer,
    *,
    tries: int = TRIES,
    step: Callable[[str], None] = lambda note: None,
    failed: Callable[[SteerError], None] | None = None,
) -> TraitSpec:
    """Let a model write a specification.

    Args:
        trait: its name.
        description: one sentence on what it looks like.
        writer: the model.
        tries: replies to each part at the most.
        step: called with a few words before each request.
        failed: called with the error if the model fails after some part has been written; that part then comes back.
            None raises the error in any case.

    Returns:
        The specification; what no reply gave is still to be filled in, see `TraitSpec.open_places`.

    Raises:
        DataError: the name is empty.
        SteerError: the model cannot be reached.
    """
    skeleton(trait, description)  # mistakes in the name, before anything is asked
    head = _HEAD.format(trait=trait, description=f" {description}" if description else "")

    def ask(part: str, prompt: str, number: int) -> str:
        step(f"{part}, try {number + 1}")
        return writer(head + prompt, number)

    opposite: str | None = None
    pairs: list[Instruction] = []
    questions: list[str] = []
    scale: dict[str, str] = {}
    try:
        for number in range(tries):
            opposite = opposite or opposite_in(ask("assistants", _NAMES.format(trait=trait), number), trait)
        for number in range(tries):
            if len(pairs) < INSTRUCTIONS:
                others = _others("instructions", [pair.positive for pair in pairs])
                reply = ask("instructions", _PAIRS.format(count=INSTRUCTIONS - len(pairs), others=others), number)
                _add(pairs, pairs_in(reply), INSTRUCTIONS, lambda pair: pair.positive)
        for number in range(2 * tries):
            if len(questions) < QUESTIONS:
                others = _others("questions", questions)
                reply = ask("questions", _QUESTIONS.format(count=QUESTIONS - len(questions), others=others), number)
                _add(questions, questions_in(reply), QUESTIONS, lambda question: question)
        for number in range(tries):
            if len(scale) < len(SCALE) + 2:
                scale = {**scale_in(ask("rubric", _SCALE.format(), number)), **scale}
    except SteerError as error:
        if failed is None or not (opposite or pairs or questions or scale):
            raise
        failed(error)
    return _assembled(trait, description, opposite, pairs, questions, scale)


def _assembled(
    trait: str,
    description: str,
    opposite: str | None,
    pairs: Sequence[Instruction],
    questions: Sequence[str],
    scale: dict[str, str],
) -> TraitSpec:
    """What there is, and places to fill in for what there is not."""

    def place(what: str) -> str:
        return f"{FILL_IN}{what}>"

    missing = [
        Instruction(
            place(f"an instruction that makes every answer {trait}, in the {_ordinal(number)} way"),
            place("the same with the opposite, alike in length and build"),
        )
        for number in range(len(pairs) + 1, INSTRUCTIONS + 1)
    ]
    asked = [
        place(f"question {number}, not about the trait; {'held out' if number > QUESTIONS // 2 else 'to extract from'}")
        for number in range(len(questions) + 1, QUESTIONS + 1)
    ]
    meanings = {number: scale.get(str(number), place(f"what an answer at {number} is like")) for number in SCALE}
    counts, beside = (scale.get(key, place(what)) for key, what in (
        ("counts", "what shows the trait in an answer"),
        ("does_not_count", "what may be taken for the trait and is not"),
    ))  # fmt: skip
    return TraitSpec(
        trait=trait,
        instructions=(*pairs, *missing),
        questions=(*questions, *asked),
        rubric=assembled_rubric(trait, counts, beside, meanings),
        description=description or place("one sentence on what the trait looks like"),
        assistants=(trait, opposite or place("what the opposite assistant is called, such as helpful")),
    )


def _ordinal(number: int) -> str:
    return ("first", "second", "third", "fourth", "fifth")[number - 1]


def _others(what: str, known: Sequence[str]) -> str:
    return f" They must differ from these {what}: {json.dumps(list(known), ensure_ascii=False)}" if known else ""


def _add(kept: list[Any], found: Iterable[Any], most: int, key: Callable[[Any], str]) -> None:
    """Take what is new, up to a number."""
    seen = {" ".join(key(one).casefold().split()) for one in kept}
    for one in found:
        name = " ".join(key(one).casefold().split())
        if len(kept) < most and name not in seen:
            kept.append(one)
            seen.add(name)
