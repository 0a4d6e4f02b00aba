"""The text of a recipe for data of one's own: every key that matters, each with what it means."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from steerkit.methods._registry import resolve
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.recipe.parts import DataPart, EvaluatePart, MethodPart, ModelPart

__all__ = ["recipe_text", "usual_questions", "usual_readout"]

_QUESTIONS = 3
_NOTES = {
    "held_out": "share of the items that is measured on and not fitted on",
    "marked": "held out is what the file marks",
    "columns": "names of columns that are not the usual ones",
    "against": "the file of the other side",
    "positive": "the label of the positive side",
    "raw": "prompts are left without the chat template",
    "escapes": "a written \\n in prompts is a line break",
}


def recipe_text(
    behaviour: str, title: str, *, data: DataPart, model: ModelPart, method: MethodPart, questions: Sequence[str]
) -> str:
    """Write a recipe as a person would who explains it.

    Args:
        behaviour: what the vector brings about.
        title: one line on the two sides.
        data: the data.
        model: the model.
        method: how the vector is fitted.
        questions: answered before and after.

    Returns:
        The text of a .toml file.
    """
    parts = {
        "model": [_line(key, value) for key, value in asdict(model).items() if value not in (None, False)],
        "data": _data(data),
        "method": _method(method),
        "apply": [
            _unsaid("scope", "response", "tokens that are written; left out: the method's own"),
            _unsaid("strength", 1.5, "the one to use; `steerkit calibrate` measures it"),
        ],
        "evaluate": [
            "strengths = [-2.0, -1.0, 0.0, 1.0, 2.0]",
            _listed("questions", questions),
        ],
    }
    head = [
        "# How one steering vector is made: `steerkit extract FILE`, `steerkit calibrate FILE`.",
        '# Files are named relative to this one; all keys are on the page "Recipes and data files".',
        "format = 1",
        _line("behaviour", behaviour, "what the vector brings about"),
        _line("title", title),
    ]
    return "\n".join(head + [line for name, lines in parts.items() for line in ("", f"[{name}]", *lines)]) + "\n"


def _data(part: DataPart) -> list[str]:
    said = {key: value for key, value in asdict(part).items() if value is not None and key != "seed"}
    if part.marked:
        del said["held_out"]
    return [_line(key, value, _NOTES.get(key, "")) for key, value in said.items()] + [_line("seed", part.seed)]


def _method(part: MethodPart) -> list[str]:
    lines = [_line("name", part.name, resolve(part.name).title)]
    where = "blocks, counted from 0"
    if part.layers is None:
        lines.append(_unsaid("layers", [12, 14], f"{where}; left out: the method's own"))
    else:
        lines.append(_line("layers", list(part.layers), where))
    if part.readout is None:
        lines.append(_unsaid("readout", "mean", "tokens that are read; left out: the method's own"))
    else:
        lines.append(_line("readout", part.readout, "tokens that are read: those of the answer"))
    return lines + (["", "[method.settings]"] + [_line(*one) for one in part.settings.items()] if part.settings else [])


def _line(key: str, value: object, note: str = "") -> str:
    said = f"{key} = {_value(value)}"
    return f"{said:<32} # {note}" if note else said


def _unsaid(key: str, value: object, note: str) -> str:
    """A key that can be said, with a value as an example."""
    return _line(f"# {key}", value, note)


def _listed(key: str, values: Sequence[str]) -> str:
    return f"{key} = [\n" + "".join(f"    {_value(value)},\n" for value in values) + "]"


def _value(value: object) -> str:
    """A value as TOML writes it; JSON's escapes are among its own, and only DEL has to be escaped beside them."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_value(str(key))} = {_value(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def usual_readout(items: ContrastSet, method: str) -> str | None:
    """Which tokens are read of data: those of the answers, where there are any; None leaves it to the method.

    Args:
        items: the data.
        method: by which vectors are fitted.
    """
    kind: Any = resolve(method)
    answers = all(item.answer is not None for item in (*items.positive, *items.negative))
    return "response_mean" if kind.readout == "last" and answers else None


def usual_questions(items: ContrastSet) -> list[str]:
    """Questions that show an effect: the first short prompts that are different.

    Args:
        items: the data.
    """
    found = dict.fromkeys(filter(None, map(_asked, items.positive)))
    short = [text for text in found if len(text) < 200] or [textwrap.shorten(next(iter(found), ""), 200)]
    return [text for text in short[:_QUESTIONS] if text] or list(EvaluatePart().questions)


def _asked(item: Conversation) -> str:
    """What is asked in a prompt that has an answer; nothing in one that has none."""
    if item.answer is None:
        return ""
    if isinstance(item.prompt, str):
        return item.prompt.strip()
    asked = [turn["content"] for turn in item.prompt if turn["role"] == "user"]
    return str(asked[-1]).strip() if asked else ""
