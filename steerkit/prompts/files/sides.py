"""Both sides of a contrast, of one file of pairs or labelled prompts, or of two files of prompts."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steerkit.errors import DataError, near_miss
from steerkit.prompts.conversation import SIDES, Conversation, check_text
from steerkit.prompts.files.columns import CHATS, LABELS, PROMPTS, Columns
from steerkit.prompts.files.labelled import ANSWERS, Labelled, labelled_item, sides_of_labels
from steerkit.prompts.files.labelled import KEYS as LABELLED_KEYS
from steerkit.prompts.files.pairs import answered, is_ours, pair_of
from steerkit.prompts.files.prompts import as_raw, placed_prompts
from steerkit.prompts.files.reading import read_rows
from steerkit.prompts.files.rows import Rows, item_at
from steerkit.prompts.files.source import STDIN, name_of
from steerkit.prompts.files.tables import memory_rows
from steerkit.prompts.files.telling import tell, tell_of_tools

__all__ = ["Sides", "of_labelled", "of_pairs", "of_table", "read_sides", "sides_of"]


# The keys of a line of answers that `persona extract` keeps; a first line says what they depend on.
_ROLLOUT = {"question", "instruction", "sample", *SIDES}


class Sides(NamedTuple):
    """What a contrast set is made of, see there."""

    positive: tuple[Conversation, ...]
    negative: tuple[Conversation, ...]
    paired: bool
    source: str
    marks: tuple[bool, ...] = ()
    origins: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    topics: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


def read_sides(
    source: str | Path,
    *,
    against: str | Path | None = None,
    columns: Columns | None = None,
    labels: tuple[object, object] = (None, None),
    raw: bool = False,
    escapes: bool = False,
) -> Sides:
    r"""Read both sides of a contrast, whatever the format of the file.

    Args:
        source: a file, - for stdin, or ``hf:`` and the name of a data set.
        against: a second file, whose prompts are the negative side; `source` then holds the positive ones.
        columns: names of columns that are not the usual ones.
        labels: of labelled prompts: the label of the positive side and of the negative one; None finds it.
        raw: leave prompts that are text as they are, without the chat template.
        escapes: read a written ``\n`` in texts as a line break.

    Raises:
        DataError: a file cannot be read or holds nothing, or, with its place, a row is not what it should be.

    Warns:
        UserWarning: see `steerkit.prompts.files.telling`.
    """
    columns = columns or Columns()
    if against is not None:
        if str(source) == str(against) == STDIN:
            raise DataError("stdin: cannot be both sides; give a file for one of them")
        first, second = (placed_prompts(one, columns) for one in (source, against))
        tell([*first, *second], raw=raw, escapes=escapes)
        name = f"{Path(name_of(source)).name}, {Path(name_of(against)).name}"
        sides = [tuple(as_raw(one, raw=raw, escapes=escapes) for _, one in side) for side in (first, second)]
        return Sides(sides[0], sides[1], len(first) == len(second), name)
    rows = read_rows(source, columns, what="pairs")
    found = sides_of(rows, columns, labels)
    tell_of_tools(rows.name, rows.rows)
    places = rows.places if found.paired else itertools.repeat(rows.name)
    each = itertools.chain(zip(places, found.positive, strict=False), zip(places, found.negative, strict=False))
    tell(each, raw=raw, escapes=escapes)
    sides = [tuple(as_raw(one, raw=raw, escapes=escapes) for one in side) for side in (found.positive, found.negative)]
    return found._replace(positive=sides[0], negative=sides[1])


def sides_of(rows: Rows, columns: Columns, labels: tuple[object, object] = (None, None)) -> Sides:
    """Both sides of rows, which are pairs, or else labelled prompts.

    Args:
        rows: of a file.
        columns: names of columns that are not the usual ones.
        labels: the label of the positive side and of the negative one.

    Raises:
        DataError: rows are neither, or one of them is not what it should be.
    """
    first = next((row.value for row in rows.rows), None)
    if rows.kind == "text" and rows.rows:
        raise DataError(
            f"{rows.name}: plain text has no two sides; give pairs (JSONL, CSV, ...), or two files of prompts with "
            "--positive and --negative"
        )
    if isinstance(first, Mapping):
        with item_at(rows.name):
            has_label = columns.find(first, "label", LABELS) is not None
            has_pair = is_ours(first, columns) or columns.sides(first) is not None
        if labels != (None, None) or "label" in columns.named or (has_label and not has_pair):
            return of_labelled(rows, columns, labels)
        if any(isinstance(row.value, Mapping) and row.value.keys() >= _ROLLOUT for row in rows.rows[:2]):
            raise DataError(f"{rows.name}: answers of a persona without their questions; give pairs.jsonl beside it")
    return of_pairs(rows, columns)


def of_pairs(rows: Rows, columns: Columns) -> Sides:
    """Both sides of rows that are pairs.

    Args:
        rows: of a file.
        columns: names of columns that are not the usual ones.

    Raises:
        DataError: there is none, or, with its place, a row is none.
    """
    pairs = rows.each(lambda value: pair_of(value, columns, is_table=rows.is_table))
    if not pairs:
        raise DataError(f"{rows.name}: the file holds no item; write one JSON object a line")
    origins = tuple(str(pair.source) for pair in pairs) if all(pair.source is not None for pair in pairs) else ()
    marked = any(pair.held_out is not None for pair in pairs)
    return Sides(
        tuple(pair.sides[0] for pair in pairs),
        tuple(pair.sides[1] for pair in pairs),
        paired=True,
        source=Path(rows.name).name,
        marks=tuple(bool(pair.held_out) for pair in pairs) if marked else (),
        origins=(origins, origins),
    )


def of_labelled(rows: Rows, columns: Columns, labels: tuple[object, object] = (None, None)) -> Sides:
    """Both sides of rows that are labelled prompts.

    Args:
        rows: of a file.
        columns: names of columns that are not the usual ones.
        labels: the label of the positive side and of the negative one; None finds it.

    Raises:
        DataError: there is none, a label is not clear, or, with its place, a row is none.
    """
    ours = not rows.is_table and not columns.named and _is_labelled_line(next((row.value for row in rows.rows), None))
    has_source: list[bool] = []

    def read(value: object) -> Labelled:
        item = labelled_item(value, columns, is_ours=ours, is_table=rows.is_table)
        has_source.append(item.source is not None)
        if has_source[-1] is not has_source[0]:
            raise DataError("some lines have a source and others have none; give one to all, or to none")
        return item

    items = rows.each(read)
    if not items:
        raise DataError(f"{rows.name}: the file holds no item; write one JSON object a line")
    with item_at(rows.name):
        wanted = sides_of_labels(items, *labels)
    sides: list[Sequence[Labelled]] = [[item for item in items if item.label == label] for label in wanted]
    first, second = (tuple(item.prompt for item in side) for side in sides)
    origins = tuple(tuple(item.source for item in side if item.source is not None) for side in sides)
    named = any(item.topic for side in sides for item in side)
    topics = tuple(tuple(item.topic for item in side if named) for side in sides)
    facts: dict[str, Any] = {"origins": (origins[0], origins[1]), "topics": (topics[0], topics[1])}
    return Sides(first, second, paired=False, source=Path(rows.name).name, **facts)


def _is_labelled_line(row: Any) -> bool:
    """Whether a row is a line of steerkit's own labelled prompts."""
    if not isinstance(row, Mapping) or any(key in row for key in ANSWERS):
        return False
    others = {*PROMPTS, *CHATS, *LABELS} - set(LABELLED_KEYS)
    return ("prompt" in row or "label" in row) and not others & set(row)


def of_table(
    table: Any, positive: str | None, negative: str | None, *, prompt: str | None = None, system: str | None = None
) -> Sides:
    """Both sides of a table in memory.

    Args:
        table: a `datasets.Dataset`, a DataFrame, a list of objects, or an object of columns.
        positive: the column of one side; None finds both sides by their usual names.
        negative: the column of the other.
        prompt: the column of prompts that both answer.
        system: the column of system prompts that both have.

    Raises:
        DataError: it is no table, a column is missing, or, with its place, a row is wrong.
    """
    rows = memory_rows(table)
    if positive is None and negative is None:
        named = {"prompt": prompt, "system": system}
        return sides_of(rows, Columns({role: name for role, name in named.items() if name is not None}))
    if positive is None or negative is None:
        raise DataError("positive and negative are the columns of both sides; give both, or none of them")
    pairs = []
    for row in rows.rows:
        with item_at(row.place):
            pairs.append(_of_columns(row.value, positive, negative, prompt, system))
    first, second = (tuple(pair[side] for pair in pairs) for side in (0, 1))
    return Sides(first, second, paired=True, source=rows.name)


def _of_columns(
    row: object, positive: str, negative: str, prompt: str | None, system: str | None
) -> tuple[Conversation, Conversation]:
    """Both sides of a row, by the names of its columns."""
    if not isinstance(row, Mapping):
        raise DataError(f"expected an object of columns, got {reprlib.repr(row)}")
    for column in (positive, negative, prompt, system):
        if column is not None and column not in row:
            raise DataError(f"the dataset has no column {column!r}; {near_miss(column, map(str, row))}")
    common = None if system is None else row[system]
    if system is not None:
        check_text(system, common)
    if prompt is None:
        first, second = (Conversation.of(row[side], system=common) for side in (positive, negative))
    else:
        first, second = (answered(row[prompt], row[side], system=common) for side in (positive, negative))
    return first, second
