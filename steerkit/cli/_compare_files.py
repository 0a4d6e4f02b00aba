"""The files of `steerkit compare`: the table in three forms, and the command line that measures it again."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerkit.cli._model import ModelChoice
    from steerkit.evaluate.calibration.budget import Budget
    from steerkit.evaluate.compare import Row

__all__ = ["command_line", "kept_rows", "together", "write"]


def command_line(
    asked: list[str], methods: list[str], budget: Budget, options: dict[str, Any], model: ModelChoice
) -> str:
    """The command line that measures the same again, with every option that changes it.

    Args:
        asked: the behaviour of the recipes, or the options of data.
        methods: asked for by name.
        budget: of all methods.
        options: the other options, by name.
        model: which model, and how it is loaded.
    """
    words = ["steerkit", "compare", *asked, *(f"--method={one}" for one in methods)]
    words += [f"--{key.replace('_', '-')}={value:g}" for key, value in asdict(budget).items()]
    words += [f"--{key}={value}" for key, value in options.items()]
    words += [flag if value is None else f"{flag}={value}" for flag, value in model.options().items()]
    return shlex.join(words)


def write(rows: list[Row], content: dict[str, Any], target: Path) -> None:
    """Write the content as JSON, the table and the report.

    Args:
        rows: of the table.
        content: of the report.
        target: the JSON file; the others stand beside it.
    """
    from steerkit._support.files import write_whole
    from steerkit.evaluate.compare_table import markdown
    from steerkit.report.comparison import comparison_html

    files = {"json": json.dumps(content, indent=2) + "\n", "md": markdown(rows), "html": comparison_html(content)}
    for ending, text in files.items():
        write_whole(target.with_suffix(f".{ending}"), text.encode())


def kept_rows(target: Path, content: dict[str, Any]) -> list[Row]:
    """The rows of a table that was measured alike.

    Args:
        target: the table's JSON file, which may not exist.
        content: what is measured now, and on what.

    Raises:
        DataError: that table was measured on something else.
    """
    from steerkit.errors import DataError
    from steerkit.evaluate.compare import Row

    if not target.exists():
        return []
    before = json.loads(target.read_text(encoding="utf-8"))
    other = [name for name in ("model", "budget", "digests", "environment") if before.get(name) != content[name]]
    if other:
        raise DataError(
            f"{target}: its {' and '.join(other)} are not those of now; measure all methods, without --keep"
        )
    return [Row.from_json(row) for row in before["rows"]]


def together(rows: list[Row], before: list[Row]) -> list[Row]:
    """The rows, and those of other methods in a table that was measured alike, sorted by method.

    Args:
        rows: measured now.
        before: of the table.

    Returns:
        All of them, but for rows that set another method than the best beside asking.
    """
    from steerkit.evaluate.compare_prompting import best_method, is_of

    own = {row.method for row in rows}
    every = [*rows, *(row for row in before if row.method not in own)]
    best = best_method(every)
    return sorted((row for row in every if is_of(row, best)), key=lambda row: (row.own_costs, row.method))
