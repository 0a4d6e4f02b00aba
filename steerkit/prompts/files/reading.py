"""Rows of whatever file there is: what it is, its content tells, not its ending."""

from __future__ import annotations

from pathlib import Path

from steerkit.errors import DataError
from steerkit.prompts.files.columns import Columns
from steerkit.prompts.files.csv_rows import csv_rows
from steerkit.prompts.files.json_rows import json_rows
from steerkit.prompts.files.rows import Row, Rows
from steerkit.prompts.files.source import HUB, content_of, name_of, text_of
from steerkit.prompts.files.tables import PARQUET, hub_rows, parquet_rows

__all__ = ["read_rows"]


def read_rows(source: str | Path, columns: Columns | None = None, *, what: str = "prompts") -> Rows:
    """Read a file, stdin, or a data set of the hub.

    Parquet is told by its first bytes, JSON by its brackets, a table of text by a header with a usual column or one
    that was named; everything else is plain text, a row each line.

    Args:
        source: a file, - for stdin, or ``hf:`` and the name of a data set, for which the network is used.
        columns: names of columns that are not the usual ones.
        what: what the file should hold, for messages.

    Raises:
        DataError: it cannot be read, with its name and the place of the mistake.
    """
    if str(source).startswith(HUB):
        return hub_rows(str(source))
    name, columns = name_of(source), columns or Columns()
    content = content_of(source, what)
    if content.startswith(PARQUET):
        return parquet_rows(name, content)
    text = text_of(name, content)
    found = json_rows(name, text, columns) or csv_rows(name, text, columns)
    if found is not None:
        return found
    if columns.named:
        listed = ", ".join(columns.named.values())
        raise DataError(f"{name}: plain text, its first line is no header with {listed}; leave --columns out")
    lines = ((number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1))
    return Rows(name, "text", tuple(Row(line, f"line {number}") for number, line in lines if line.strip()))
