"""Writing files and folders whole or not at all, and files that grow line by line.

Of several processes that share the work the first one alone writes.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from steerkit._support.processes import is_first
from steerkit.errors import ModelError, SteerError

__all__ = ["append", "check_folder", "check_place", "take_place", "whole_file", "whole_folder", "write_whole"]

_MARKS = ("config.json", "adapter_config.json")


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the target, then take its place; whatever stops it, no partial file stays.

    Args:
        path: where; missing folders are made, a link stays a link.
        data: the content.

    Raises:
        OSError: it cannot be written there.
    """
    with whole_file(path) as handle:
        handle.write(data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Fill a file beside the target, which takes its place when the block ends well; else nothing of it stays.

    Args:
        path: where; missing folders are made, a link stays a link.

    Yields:
        The file to fill.

    Raises:
        OSError: it cannot be written there.
    """
    if not is_first():
        yield io.BytesIO()
        return
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".steerkit-{secrets.token_hex(8)}.tmp")
    try:
        with partial.open("xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def append(path: Path, data: bytes) -> None:
    """Add to a file; what was added is on the disk before this returns.

    Args:
        path: the file, made with its folder where it is not there.
        data: what is added.

    Raises:
        OSError: it cannot be written.
    """
    if not is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


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
    check_place(target, ModelError)


def check_place(target: Path, error: type[SteerError]) -> None:
    """Find out whether anything could be written at a place. Leaves nothing behind.

    Args:
        target: the file or folder to be; missing folders on the way are fine.
        error: what is raised where nothing can.

    Raises:
        SteerError: nothing can be written there.
    """
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as reason:
        raise error(f"{target}: cannot be written ({reason.strerror}); choose another folder") from None


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

    if not is_first():
        with tempfile.TemporaryDirectory() as aside:
            yield Path(aside)
        return
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
                take_place(filled, target, work / "replaced")
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error


def _prefix(target: Path) -> str:
    return f".{target.name}.steerkit-"


def _clear_leftovers(target: Path) -> None:
    """Delete what killed processes left behind beside the target; what a living one holds is locked and stays."""
    import filelock

    for work in target.parent.glob(f"{_prefix(target)}*"):
        with contextlib.suppress(filelock.Timeout, OSError), filelock.FileLock(work / "lock", timeout=0):
            shutil.rmtree(work, ignore_errors=True)


def take_place(filled: Path, target: Path, aside: Path) -> None:
    """Rename the new folder to the target's name; what stood there is back if that fails.

    Args:
        filled: the new folder.
        target: where it goes.
        aside: where what stands there goes meanwhile, on the same file system.

    Raises:
        OSError: it cannot be renamed.
    """
    if not target.exists():
        filled.rename(target)
        return
    target.rename(aside)
    try:
        filled.rename(target)
    except BaseException:
        aside.rename(target)
        raise
