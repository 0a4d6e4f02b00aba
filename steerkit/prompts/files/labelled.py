"""Labelled prompts of rows: a prompt, the label of its side, and where it comes from."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from steerkit.errors import DataError, near_miss
from steerkit.prompts.conversation import Conversation, check_text
from steerkit.prompts.files.columns import LABELS, Columns
from steerkit.prompts.files.prompts import flag, prompt_of

__all__ = ["ANSWERS", "KEYS", "Labelled", "label_of", "labelled_item", "sides_of_labels"]

KEYS = ("prompt", "label", "raw", "id", "topic", "source")
# Of a prompt that is labelled for its answer; other names stand for other things too often.
ANSWERS = ("response", "completion")
_YES = {"1": "1", "1.0": "1", "true": "1", "0": "0", "0.0": "0", "false": "0"}
# Which side of a usual pair of labels is the positive one.
_USUAL = (("1", "0"), ("positive", "negative"), ("pos", "neg"), ("yes", "no"))


class Labelled(NamedTuple):
    """One labelled prompt.

    Attributes:
        prompt: the prompt, or prompt and answer.
        label: of its side, see `label_of`.
        source: where it comes from; None where the row does not say.
        topic: of what kind it is; "" where the row does not say.
    """

    prompt: Conversation
    label: str
    source: str | None
    topic: str = ""


def label_of(value: object) -> str:
    """A label as text: true and 1 are the same label, whether they are written as text or not.

    Args:
        value: a text, a whole number, true or false.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool | int):
        value = str(value)
    check_text("label", value)
    text = str(value)
    return _YES.get(text.strip().casefold(), text)


def labelled_item(row: object, columns: Columns, *, is_ours: bool, is_table: bool) -> Labelled:
    """One row.

    Args:
        row: an object.
        columns: names of columns that are not the usual ones.
        is_ours: the rows are lines of steerkit's own format, in which another key is a mistake.
        is_table: an empty cell is a missing one.

    Raises:
        DataError: it is no object, a key is missing or unknown, or is no text.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"expected a JSON object, got {reprlib.repr(row)}; write one object a line")
    if is_ours:
        for key in row:
            if key not in KEYS:
                raise DataError(f"unknown key {key!r}; {near_miss(str(key), KEYS)}")
        for key in ("prompt", "label"):
            if key not in row:
                raise DataError(f"no {key!r}; a line has a prompt and the label of its side")
    name = columns.find(row, "label", LABELS)
    if name is None:
        raise DataError(f"no label; it has {columns.told(row)}; name its column with --columns label=NAME")
    label, source = label_of(row[name]), _source(row, columns, is_table=is_table)
    topic = row.get("topic")
    return Labelled(_prompt(row, columns, is_table=is_table), label, source, topic if isinstance(topic, str) else "")


def _prompt(row: Mapping[str, Any], columns: Columns, *, is_table: bool) -> Conversation:
    prompt = prompt_of(row, columns, is_table=is_table)
    answer = columns.find(row, "response", ANSWERS)
    if answer is not None and row[answer] not in (None, ""):
        prompt = Conversation.of(prompt, answer=row[answer])
    return Conversation.of(prompt, raw=flag(row, "raw", is_table=is_table))


def _source(row: Mapping[str, Any], columns: Columns, *, is_table: bool) -> str | None:
    name = columns.find(row, "source", ("source",))
    if name is None or (is_table and row[name] in (None, "")):
        return None
    check_text("source", row[name])
    return str(row[name])


def sides_of_labels(items: Sequence[Labelled], positive: object, negative: object) -> tuple[str, str]:
    """The labels of both sides.

    Args:
        items: of the file.
        positive: the positive side's; None takes the usual one of two, such as 1 beside 0.
        negative: the other; None where there is only one other.

    Raises:
        DataError: a label is not there, or which one is meant is not clear.
    """
    labels = {item.label for item in items}
    listed = ", ".join(sorted(labels))
    if positive is None:
        usual = [pair for pair in _USUAL if {label.casefold() for label in labels} == set(pair)]
        if not usual:
            raise DataError(f"the labels are {listed}; name the positive one")
        first = next(label for label in labels if label.casefold() == usual[0][0])
    else:
        first = label_of(positive)
    others = sorted(labels - {first})
    if negative is None:
        if len(others) > 1:
            raise DataError(f"beside {first!r} there are the labels {', '.join(others)}; name the negative one")
        if not others:
            raise DataError(f"every line has the label {first!r}; a contrast needs both sides")
    second = others[0] if negative is None else label_of(negative)
    for label in (first, second):
        if label not in labels:
            raise DataError(f"no line has the label {label!r}; {near_miss(label, labels)}")
    return first, second
