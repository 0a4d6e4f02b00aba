"""Trait specifications as files: our TOML, and the JSON of the persona vectors paper."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steerkit.errors import DataError, near_miss
from steerkit.persona.instruction import SIDES, Instruction
from steerkit.persona.trait_checks import text_of

if TYPE_CHECKING:
    from steerkit.persona.traits import TraitSpec

__all__ = ["as_toml", "read_json", "read_toml"]

FORMAT = 1
_KEYS = ("format", "trait", "description", "assistants", "instructions", "questions", "rubric")
_PAPER_KEYS = ("instruction", "questions", "eval_prompt")


def read_toml(text: str) -> dict[str, Any]:
    """Read a specification from our TOML.

    Args:
        text: of the file.

    Returns:
        The fields of a `TraitSpec`.

    Raises:
        DataError: it is no TOML, of another format, or has other keys or types than a specification.
    """
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"not a TOML file ({error})") from None
    if found.get("format") != FORMAT:
        raise DataError(f"format = {found.get('format')!r}; this version of steerkit reads {FORMAT}")
    _check_keys(found, _KEYS, ("trait", "instructions", "questions", "rubric"))
    names = _pair_of("assistants", found.get("assistants", dict.fromkeys(SIDES, "")), SIDES)
    return {
        "trait": found["trait"],
        "instructions": _pairs_of("instructions", found["instructions"], SIDES),
        "questions": _list_of("questions", found["questions"]),
        "rubric": text_of("rubric", found["rubric"]),
        "description": found.get("description", ""),
        "assistants": (names.positive, names.negative),
    }


def read_json(name: str, text: str) -> dict[str, Any]:
    """Read a specification from the paper's JSON.

    Args:
        name: of the file, which names the trait.
        text: of the file.

    Returns:
        The fields of a `TraitSpec`.

    Raises:
        DataError: it is no JSON, no object, or has other keys or types than a specification.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON file ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"a {type(found).__name__}, not an object with {', '.join(_PAPER_KEYS)}")
    _check_keys(found, _PAPER_KEYS, _PAPER_KEYS)
    return {
        "trait": name.replace("_", " "),
        "instructions": _pairs_of("instruction", found["instruction"], ("pos", "neg")),
        "questions": _list_of("questions", found["questions"]),
        "rubric": text_of("eval_prompt", found["eval_prompt"]),
    }


def as_toml(spec: TraitSpec) -> str:
    """Write a specification as our TOML, which `read_toml` reads.

    Args:
        spec: the specification.
    """
    positive, negative = map(_quoted, spec.assistants)
    half = len(spec.extraction_questions)
    lines = [f"format = {FORMAT}", f"trait = {_quoted(spec.trait)}", f"description = {_quoted(spec.description)}"]
    if any(spec.assistants):
        lines.append(f"assistants = {{ positive = {positive}, negative = {negative} }}")
    lines += [
        "instructions = [",
        *(
            f"    {{ positive = {_quoted(pair.positive)}, negative = {_quoted(pair.negative)} }},"
            for pair in spec.instructions
        ),
        "]",
        f"# The first {half} are for extraction, the last {len(spec.questions) - half} are held out.",
        "questions = [",
        *(f"    {_quoted(question)}," for question in spec.questions),
        "]",
        f'rubric = """\n{_quoted_lines(spec.rubric)}"""',
    ]
    return "\n".join(lines) + "\n"


def _check_keys(found: Mapping[str, Any], known: Sequence[str], needed: Sequence[str]) -> None:
    for key in found:
        if key not in known:
            raise DataError(f"unknown key {key!r}; {near_miss(key, known)}")
    missing = [key for key in needed if key not in found]
    if missing:
        raise DataError(f"no {', '.join(map(repr, missing))}; a specification has {', '.join(needed)}")


def _list_of(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise DataError(f"{name}: expected a list, got {type(value).__name__}")
    return tuple(value)


def _pairs_of(name: str, value: object, keys: tuple[str, str]) -> tuple[Instruction, ...]:
    return tuple(
        _pair_of(f"{name}, pair {place}", pair, keys) for place, pair in enumerate(_list_of(name, value), start=1)
    )


def _pair_of(name: str, value: object, keys: tuple[str, str]) -> Instruction:
    if not isinstance(value, dict):
        raise DataError(f"{name}: expected an object with {' and '.join(keys)}, got {type(value).__name__}")
    try:
        _check_keys(value, keys, keys)
        return Instruction(*(text_of(key, value[key]) for key in keys))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _quoted(text: str) -> str:
    """A basic string of TOML; JSON's escapes are among its own, and only DEL has to be escaped beside them."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _quoted_lines(text: str) -> str:
    """The inside of a basic string of TOML of several lines."""
    lines = "\n".join(_quoted(line)[1:-1] for line in text.split("\n"))
    return lines if '"""' in text or text.endswith('"') else lines.replace('\\"', '"')
