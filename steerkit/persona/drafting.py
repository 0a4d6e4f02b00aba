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
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from steerkit._support.endpoint import Endpoint
from steerkit.errors import SteerError
from steerkit.generation import generate
from steerkit.persona.traits import FILL_IN, Instruction, TraitSpec, assembled_rubric
from steerkit.prompts.conversation import Conversation

__all__ = ["Writer", "draft", "endpoint_writer", "model_writer", "skeleton"]

INSTRUCTIONS, QUESTIONS = 5, 40
TRIES = 4
SCALE = (0, 25, 50, 75, 100)
LONGEST_REPLY = 2000  # tokens

Writer = Callable[[str, int], str]
"""From a prompt and the number of the try to a reply; another try should give another reply."""

_SIDES = ("positive", "negative")
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
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_ITEM = re.compile(r"^\s*(?:[-*\u2022]|\d{1,3}[.):])\s+(.+?)\s*$", re.MULTILINE)


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
            opposite = opposite or _opposite(ask("assistants", _NAMES.format(trait=trait), number), trait)
        for number in range(tries):
            if len(pairs) < INSTRUCTIONS:
                others = _others("instructions", [pair.positive for pair in pairs])
                reply = ask("instructions", _PAIRS.format(count=INSTRUCTIONS - len(pairs), others=others), number)
                _add(pairs, _pairs(reply), INSTRUCTIONS, lambda pair: pair.positive)
        for number in range(2 * tries):
            if len(questions) < QUESTIONS:
                others = _others("questions", questions)
                reply = ask("questions", _QUESTIONS.format(count=QUESTIONS - len(questions), others=others), number)
                _add(questions, _questions(reply), QUESTIONS, lambda question: question)
        for number in range(tries):
            if len(scale) < len(SCALE) + 2:
                scale = {**_scale(ask("rubric", _SCALE.format(), number)), **scale}
    except SteerError as error:
        if failed is None or not (opposite or pairs or questions or scale):
            raise
        failed(error)
    return _assembled(trait, description, opposite, pairs, questions, scale)


def endpoint_writer(spec: str, api_key: str | None = None) -> Writer:
    """A writer behind an OpenAI-compatible endpoint.

    Args:
        spec: ``https://host/v1#model-name``.
        api_key: as for `steerkit.endpoint.Endpoint`.

    Raises:
        SteerError: the address is none, or no model is named.
    """
    base_url, _, model = spec.partition("#")
    endpoint = Endpoint(base_url, model, api_key, role="writer", timeout=300.0)

    def write(prompt: str, number: int) -> str:
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": LONGEST_REPLY,
            "temperature": 0.7,
            "seed": number,
        }
        status, body = endpoint.post(asked)
        endpoint.check(status, body)
        try:
            text = json.loads(body)["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise endpoint.no_completion(body) from None
        if not isinstance(text, str):
            raise endpoint.no_completion(body)
        return text

    return write


def model_writer(model: nn.Module, tokenizer: Any, *, max_new_tokens: int = 1000) -> Writer:
    """A local model as writer.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        max_new_tokens: the longest reply, in tokens.
    """

    def write(prompt: str, number: int) -> str:
        asked = [Conversation(prompt)]
        (text,) = generate(
            model, tokenizer, asked, max_new_tokens=max_new_tokens, do_sample=True, temperature=0.7, seed=[number]
        )
        return text

    return write


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


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every whole JSON object in a text, from left to right, those inside of others only where these are torn."""
    decoder, place = json.JSONDecoder(strict=False), text.find("{")
    while place >= 0:
        try:
            found, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            yield found
        place = text.find("{", end)


def _inner(value: Any) -> Iterator[dict[str, Any]]:
    """An object, and all those inside of it."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _inner(one)


def _clean(value: Any) -> str:
    """A text on one line, "" for anything else and for what only marks a place."""
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return "" if not text.strip(". \u2026") or FILL_IN in text or not _is_text(text) else text


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of an escaped pair
        return False
    return True


def _opposite(reply: str, trait: str) -> str | None:
    """What the opposite assistant is called: something else than the trait's."""
    for found in _objects(_said(reply)):
        name = _clean(found.get("opposite"))
        if name and len(name) <= 40 and name.casefold() != " ".join(trait.casefold().split()):
            return name
    return None


def _pairs(reply: str) -> Iterator[Instruction]:
    for outer in _objects(_said(reply)):
        for found in _inner(outer):
            sides = [_clean(found.get(side, found.get(side[:3]))) for side in _SIDES]
            if all(sides) and sides[0].casefold() != sides[1].casefold():
                yield Instruction(*sides)


def _questions(reply: str) -> Iterator[str]:
    """Texts of a JSON list, whole or cut off; where there is none, the items of a list of lines."""
    said = _said(reply)
    start = said.find("[")
    if start >= 0:
        found = (_unquoted(match[0]) for match in _STRING.finditer(said, start))
    else:
        found = (match[1].strip("\"'*") for match in _ITEM.finditer(said))
    # Short ones are keys of objects, such as "question".
    yield from (text for text in map(_clean, found) if len(text.split()) >= 3)


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return ""


def _scale(reply: str) -> dict[str, str]:
    """What is there of the rubric's parts."""
    wanted = ("counts", "does_not_count", *map(str, SCALE))
    parts: dict[str, str] = {}
    for found in _objects(_said(reply)):
        parts |= {key: text for key in wanted if (text := _clean(found.get(key))) and not set(text) & set("{}")}
    return parts


def _said(reply: str) -> str:
    """A reply without what was thought before it."""
    return reply.rpartition("</think>")[2]
