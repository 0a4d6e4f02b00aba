"""Rows of tables that are no text: parquet files, data sets by name, and tables that are in memory."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steerkit.errors import DataError, near_miss
from steerkit.prompts.files.rows import Row, Rows
from steerkit.prompts.files.source import HUB

__all__ = ["PARQUET", "hub_rows", "memory_rows", "parquet_rows"]

PARQUET = b"PAR1"
"""What a parquet file begins and ends with."""
_EXTRA = "pip install 'steerkit-hf[datasets]'"
_FORM = "hf:NAME[:SPLIT], or hf:NAME:CONFIGURATION:SPLIT"


def parquet_rows(name: str, content: bytes) -> Rows:
    """The rows of a parquet file.

    Args:
        name: of the file.
        content: its bytes.

    Raises:
        DataError: pyarrow is missing, or the file is damaged.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{name}: parquet needs pyarrow; {_EXTRA}") from None
    try:
        listed = parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(f"{name}: a damaged parquet file ({reason}); get it anew") from None
    return Rows(name, "parquet", _numbered(listed))


def hub_rows(source: str) -> Rows:
    """The rows of a data set by its name on the hub, or of a folder that `datasets` knows. Uses the network.

    Args:
        source: ``hf:`` and the name, with the split behind a colon, or configuration and split.

    Raises:
        DataError: `datasets` is missing, the name is of another form, or the data set cannot be had.
    """
    parts = source.removeprefix(HUB).split(":")
    if not all(parts) or len(parts) > 3:
        raise DataError(f"{source}: give {_FORM}")
    name, configuration, split = parts[0], parts[1] if len(parts) == 3 else None, parts[-1] if parts[1:] else None
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: data sets by name need datasets; {_EXTRA}") from None
    try:
        with _quiet(datasets):
            if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
                found = datasets.load_from_disk(name)
            else:
                found = datasets.load_dataset(name, configuration)
    except Exception as error:  # noqa: BLE001 - hubs, networks and files fail in many ways
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{source}: the data set cannot be had ({reason})") from None
    if isinstance(found, Mapping):
        wanted = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
        if wanted not in found:
            raise DataError(f"{source}: no split {wanted!r}; {near_miss(wanted, map(str, found))}; give {_FORM}")
        found = found[wanted]
    elif split not in (None, str(found.split)):
        raise DataError(f"{source}: no split {split!r}; the folder holds one data set, without splits")
    return Rows(source, "data set", _numbered(found))


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No bars while a data set is made ready."""
    was = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was:
            datasets.enable_progress_bars()


def memory_rows(table: Any) -> Rows:
    """The rows of a `datasets.Dataset`, a DataFrame, a list of objects, or an object of columns.

    Args:
        table: the table.

    Raises:
        DataError: it is a dictionary of splits, or none of these.
    """
    name = str(getattr(getattr(table, "info", None), "dataset_name", None) or "")
    if isinstance(table, Mapping):
        columns = dict(table)
        if any(hasattr(one, "column_names") for one in columns.values()):
            raise DataError(f"a dictionary of splits was given ({', '.join(map(str, columns))}); give one of them")
        cells = [list(one) for one in columns.values() if isinstance(one, Iterable) and not isinstance(one, str)]
        if len(cells) < len(columns) or len(set(map(len, cells))) > 1:
            raise DataError("a table of columns has lists of one length; give such, or a list of objects")
        rows: Iterable[Any] = [dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)]
    elif hasattr(table, "to_dict") and hasattr(table, "columns") and hasattr(table, "iloc"):
        rows = table.to_dict("records")
    elif hasattr(table, "to_dicts"):
        rows = table.to_dicts()
    elif isinstance(table, Iterable) and not isinstance(table, str | bytes):
        rows = table
    else:
        raise DataError(f"expected a Dataset, a DataFrame or a list of objects, got {type(table).__name__}")
    return Rows(name, "data set", _numbered(rows))


def _numbered(rows: Iterable[Any]) -> tuple[Row, ...]:
    return tuple(Row(_plain(row), f"row {number}") for number, row in enumerate(rows))


def _plain(value: Any) -> Any:
    """Arrays of a table as lists, so that messages are lists of objects, and nothing in the place of NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and value != value else value
