"""Writing files and folders whole or not at all, and files that grow line by line."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steerkit.errors import DataError, ModelError

__all__ = ["Journal", "check_folder", "whole_folder", "write_whole"]

_MARKS = ("config.json", "adapter_config.json")


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the target, then take its place; whatever stops it, no partial file stays.

    Args:
        path: where; missing folders are made, a link stays a link.
        data: the content.

    Raises:
        OSError: it cannot be written there.
    """
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".steerkit-{secrets.token_hex(8)}.tmp")
    try:
        with partial.open("xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_folder(target: Path, *, replace: bool = False) -> None:
    """Find out whether a folder of weights could be written, before work is spent on it. Leaves nothing behind.

    Args:
        target: the folder to be; missing folders on the way are fine.
        replace: whether a checkpoint or adapter that stands there may go.

    Raises:
        ModelError: something stands there, or nothing can be written there.
    """
    if target.exists() or target.is_symlink():
        if not replace:
            raise ModelError(f"{target}: is there already; choose another folder, or replace it with --force")
        if target.is_symlink() or not any((target / mark).is_file() for mark in _MARKS):
            raise ModelError(f"{target}: is no folder of a model or adapter, so it is not replaced; choose another")
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ModelError(f"{target}: cannot be written ({error.strerror}); choose another folder") from None


@contextlib.contextmanager
def whole_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Fill a folder beside the target, which takes its place when the block ends well; else nothing of it stays.

    What a killed process left behind is cleared by the next one that writes the same target: the operating system
    frees a lock when its owner dies.

    Args:
        target: the folder to be; missing folders on the way are made.
        replace: whether a checkpoint or adapter that stands there may go.

    Yields:
        The folder to fill.

    Raises:
        ModelError: something stands there, or it cannot be written.
    """
    import filelock

    check_folder(target, replace=replace)
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target)
        work = target.parent / f"{_prefix(target)}{secrets.token_hex(8)}"
        work.mkdir()
        try:
            with filelock.FileLock(work / "lock"):
                filled = work / target.name
                filled.mkdir(parents=True)
                yield filled
                _take_place(filled, target, work / "replaced")
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error


def _prefix(target: Path) -> str:
    return f".{target.name}.steerkit-"


def _clear_leftovers(target: Path) -> None:
    import filelock

    for work in target.parent.glob(f"{_prefix(target)}*"):
        with contextlib.suppress(filelock.Timeout, OSError), filelock.FileLock(work / "lock", timeout=0):
            shutil.rmtree(work, ignore_errors=True)


def _take_place(filled: Path, target: Path, aside: Path) -> None:
    """Rename the new folder to the target's name; what stood there is back if that fails."""
    if not target.exists():
        filled.rename(target)
        return
    target.rename(aside)
    try:
        filled.rename(target)
    except BaseException:
        aside.rename(target)
        raise


class Journal:
    """A JSONL file that grows by whole batches of rows and survives being killed between and within them.

    Its first line says what the rows depend on: a file that was begun otherwise is not continued. A last line that a
    kill left torn is dropped.

    Args:
        path: the file; it is made, with its folder, by the first `append`.
        header: what the rows depend on, as JSON holds it.

    Raises:
        DataError: the file was begun with another header, cannot be read, or has a line that is no row.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self._header: dict[str, Any] = json.loads(json.dumps(header))
        self._rows: list[dict[str, Any]] = []
        self._ends: list[int] = []
        self._start = 0
        if path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        """The rows that are on the disk, in order."""
        return tuple(self._rows)

    def keep(self, count: int) -> None:
        """Drop what stands behind the first rows.

        Args:
            count: rows that stay.

        Raises:
            DataError: the file cannot be written.
        """
        if count >= len(self._rows):
            return
        self._rows, self._ends = self._rows[:count], self._ends[:count]
        self._cut()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a batch of rows, on the disk before this returns.

        Args:
            rows: what JSON can hold.

        Raises:
            DataError: the file cannot be written.
        """
        lines = [_line(row) for row in rows]
        opening = b"" if self._start else _line(self._header)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as handle:
                handle.write(b"".join([opening, *lines]))
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise self._unwritable(error) from None
        self._start = self._start or len(opening)
        for row, line in zip(rows, lines, strict=True):
            self._ends.append((self._ends[-1] if self._ends else self._start) + len(line))
            self._rows.append(dict(row))

    def _read(self) -> None:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}); choose another folder") from None
        *lines, torn = content.split(b"\n")
        place = 0
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(type(row).__name__)
            except (ValueError, RecursionError):
                raise DataError(f"{self.path}, line {number}: no row; delete the file to begin anew") from None
            place += len(line) + 1
            if number == 1:
                self._check(row)
                self._start = place
            else:
                self._rows.append(row)
                self._ends.append(place)
        if torn:
            self._cut()

    def _check(self, found: Mapping[str, Any]) -> None:
        """Refuse a file that was begun with another header."""
        for key in {**self._header, **found}:
            before, now = found.get(key), self._header.get(key)
            if before != now:
                shown = (f" {_short(before)}", f" {_short(now)}")
                raise DataError(
                    f"{self.path}: was begun with {key}{shown[0]}, now it is{shown[1]}; "
                    "give the same again, or choose another folder"
                )

    def _cut(self) -> None:
        """Shorten the file to the rows that are kept."""
        try:
            with self.path.open("r+b") as handle:
                handle.truncate(self._ends[-1] if self._ends else self._start)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"{self.path}: cannot be written ({error.strerror}); choose another folder")


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
