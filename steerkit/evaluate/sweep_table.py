"""The points of a sweep as a file: JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from steerkit._support.files import write_whole
from steerkit.errors import SteerError
from steerkit.evaluate.sweeps import Point

__all__ = ["save_table"]


def save_table(points: Sequence[Point], path: Path) -> Path:
    """Write points as a table, one line per point and column, whole or not at all.

    Args:
        points: the points.
        path: a .jsonl or .parquet file.

    Returns:
        The path.

    Raises:
        SteerError: another ending, pyarrow is missing, or it cannot be written.
    """
    rows = [
        {
            "layers": "+".join(map(str, point.layers)),
            "strength": point.strength,
            "column": name,
            **measured.as_row(),
            "random": list(point.random) if place == 0 else [],
        }
        for point in points
        for place, (name, measured) in enumerate(point.scores.items())
    ]
    if path.suffix == ".parquet":
        import io

        try:
            from pyarrow import Table, parquet
        except ImportError:
            raise SteerError(f"{path}: parquet needs pyarrow; pip install 'steerkit-hf[datasets]'") from None

        names = list(dict.fromkeys(name for row in rows for name in row))
        buffer = io.BytesIO()
        parquet.write_table(Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), buffer)
        data = buffer.getvalue()
    elif path.suffix == ".jsonl":
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        raise SteerError(f"{path}: a table is a .jsonl or a .parquet file")
    try:
        write_whole(path, data)
    except OSError as error:
        raise SteerError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    return path
