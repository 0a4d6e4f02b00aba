"""The folder of a run: one JSONL file a part, written whole: a run that is killed loses one part at the most."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steerkit._support.files import write_whole
from steerkit.errors import DataError
from steerkit.evidence.answering import Row

__all__ = ["CONDITIONS", "Folder", "Part", "part_of_behaviour", "part_of_unsteered", "texts_of"]

CONDITIONS = ("-", "0", "+", "prompt", "prompt and steering")


def part_of_unsteered(asked: str) -> str:
    """The part that holds the unsteered answers to a set of questions.

    Args:
        asked: the set.
    """
    return f"unsteered-{'questions' if asked == 'questions' else 'requests'}"


def part_of_behaviour(name: str) -> str:
    """The part that holds the answers under a behaviour's system prompts.

    Args:
        name: of the behaviour.
    """
    return f"prompted-{name}"


@dataclass(frozen=True)
class Part:
    """What one file holds.

    Attributes:
        facts: its first line; `key` is a digest of all that the answers depend on.
        rows: the answers.
    """

    facts: Mapping[str, Any]
    rows: tuple[Row, ...]

    def of(self, condition: str) -> list[Row]:
        """The rows of a condition, in order.

        Args:
            condition: see `Row`.
        """
        return [row for row in self.rows if row.condition == condition]


@dataclass(frozen=True)
class Folder:
    """Where a run keeps what it has measured.

    Attributes:
        path: the folder.
    """

    path: Path

    def file(self, name: str) -> Path:
        """The file of a part.

        Args:
            name: of the part.
        """
        return self.path / "evidence" / f"{name}.jsonl"

    def names(self) -> list[str]:
        """The parts that are there, sorted."""
        return sorted(file.stem for file in (self.path / "evidence").glob("*.jsonl"))

    def read(self, name: str) -> Part:
        """Read a part.

        Args:
            name: of the part.

        Raises:
            DataError: it is missing, cannot be read, or is none.
        """
        file = self.file(name)
        try:
            first, *lines = file.read_text(encoding="utf-8").splitlines()
            return Part(json.loads(first), tuple(Row(**json.loads(line)) for line in lines))
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}); measure it") from None
        except (ValueError, TypeError) as error:
            raise DataError(f"{file}: is no file of answers ({error}); delete it to measure anew") from None

    def has(self, name: str, key: str) -> bool:
        """Whether a part is there that depends on the same.

        Args:
            name: of the part.
            key: digest of all that it depends on.

        Raises:
            DataError: the file is damaged.
        """
        return self.file(name).is_file() and self.read(name).facts.get("key") == key

    def write(self, name: str, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Write a part, whole or not at all.

        Args:
            name: of the part.
            facts: with `key`.
            rows: the answers.

        Raises:
            DataError: it cannot be written.
        """
        lines = [json.dumps(facts, ensure_ascii=False), *(json.dumps(_plain(row), ensure_ascii=False) for row in rows)]
        try:
            write_whole(self.file(name), ("\n".join(lines) + "\n").encode())
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror}); choose another folder") from None


def texts_of(folder: Folder, part: Part) -> dict[str, list[Row]]:
    """The answers under every condition, all in the order of the vector's questions.

    Args:
        folder: of the run.
        part: a vector's answers.

    Raises:
        DataError: a part is missing or damaged, or lacks an answer.
    """
    behaviour, asked = str(part.facts["behaviour"]), str(part.facts["asked"])
    questions = [row.question for row in part.of("+")]
    places = {"0": folder.read(part_of_unsteered(asked)), "prompt": folder.read(part_of_behaviour(behaviour))}
    found = {}
    for condition in CONDITIONS:
        rows = {row.question: row for row in places.get(condition, part).of(condition)}
        missing = [question for question in questions if question not in rows] if rows else []
        if missing:
            raise DataError(f"{folder.path}: no answer to {missing[0]!r} under {condition!r}; measure it anew")
        if rows:
            found[condition] = [rows[question] for question in questions]
    return found


def _plain(row: Row) -> dict[str, Any]:
    """A row without what is as by default; figures to four places, which is more than they are worth."""
    default = asdict(Row("", ""))
    found = {name: value for name, value in asdict(row).items() if name == "text" or value != default[name]}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}
