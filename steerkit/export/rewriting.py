"""A checkpoint on the disk, written anew with other weights: larger than memory, and resumable.

Nothing is loaded as a model. What changes is made in pieces, a tensor or some rows of it at a time, and written; what
does not change goes over byte by byte. Each file appears whole or not at all and is noted with its digest, so that a
run that was killed goes on behind the last one and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor

from steerkit._support.files import check_folder, take_place
from steerkit._support.journal import Journal
from steerkit._support.precision import full_precision
from steerkit.errors import DataError, ModelError, SteerError
from steerkit.export.checkpoint import Group, header, shard_names, shards, write_index, write_values
from steerkit.monitor.checkpoints import Checkpoint

__all__ = ["RECORD", "Made", "Rewritten", "fingerprint", "in_rows", "rewrite"]

RECORD = "steerkit.json"
"""Beside the weights: what they were made of, and the digest of each file."""
CHUNK = 2**20
"""Numbers that are in memory at once."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_LEFT = ("readme.md", RECORD)


class Made(NamedTuple):
    """A tensor that is other than in the checkpoint, or that it lacks.

    Attributes:
        like: of its shape and dtype, on the meta device.
        pieces: gives its values in the order of their bytes, in pieces of any shape; they are rounded to its dtype.
    """

    like: Tensor
    pieces: Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Rewritten:
    """What was written.

    Attributes:
        folder: where.
        changed: tensors that hold other values, or are new.
        kept: tensors that went over as they were.
        resumed: files that an earlier run had finished.
        digests: file to the sha256 of its bytes.
    """

    folder: Path
    changed: tuple[str, ...]
    kept: int
    resumed: int
    digests: Mapping[str, str]


@full_precision()
def rewrite(
    source: Checkpoint,
    made: Mapping[str, Made],
    out: str | Path,
    *,
    identity: Mapping[str, Any],
    complete: Callable[[Path], None] | None = None,
    force: bool = False,
    shard_bytes: int = 10**9,
) -> Rewritten:
    """Write a checkpoint with other weights, one after the other.

    Args:
        source: what it is made of; config, tokenizer and whatever else lies beside go over.
        made: tensors that change, in the place of those of their name, and new ones, which stand behind all others.
        out: the folder to make. A killed run leaves `.NAME.unfinished` beside it, from which the same call goes on.
        identity: what the bytes depend on beside the source, as JSON holds it; a run with another one begins anew.
        complete: called with the folder when its weights are written, before it takes its place; where it refuses,
            nothing stays.
        force: replace a checkpoint that stands there.
        shard_bytes: the size at which a new file begins; what is lost by a kill is one of them at the most.

    Returns:
        What was written.

    Raises:
        ModelError: the folder cannot be written, another process is writing it, or a tensor is of a dtype that cannot
            be.
        SteerError: `complete` refuses.
    """
    import filelock

    target = Path(out).expanduser().absolute()
    check_folder(target, replace=force)
    _refuse_own_folder(source, target)
    work = target.parent / f".{target.name}.unfinished"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(work / "lock", timeout=0):
            depends = {"identity": identity, "source": fingerprint(source)}
            found = _filled(source, made, work, depends, shard_bytes)
            if complete is not None:
                _completed(complete, work)
            take_place(work / "files", target, work / "replaced")
        shutil.rmtree(work, ignore_errors=True)
    except filelock.Timeout:
        raise ModelError(
            f"{target}: another process is writing it; wait for that one, or choose another folder"
        ) from None
    except OSError as error:
        raise ModelError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error
    return Rewritten(target, *found)


def in_rows(source: Checkpoint, name: str) -> Iterator[tuple[int, Tensor]]:
    """A tensor as it is stored, some rows [k, ...] at a time, each with the number of the first of them.

    Args:
        source: the checkpoint.
        name: of the tensor. One without dimensions, or without numbers, is one piece [n].
    """
    file = source.files[name]
    entry = file.entries[name]
    if not entry.shape or not entry.size:
        yield 0, file.read(name).reshape(-1)
        return
    step = max(1, CHUNK * entry.shape[0] // max(1, entry.size // entry.dtype.itemsize))
    for start in range(0, entry.shape[0], step):
        yield start, file.rows(name, start, min(start + step, entry.shape[0]))


def fingerprint(source: Checkpoint) -> dict[str, str]:
    """What identifies a checkpoint's files: name to a digest of size, header and a sample of the bytes.

    Args:
        source: the checkpoint.
    """
    found = {}
    for one in {file.path: file for file in source.files.values()}.values():
        size = one.path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with one.path.open("rb") as file:
            for start in range(0, size, max(size // 256, 4096)):
                file.seek(start)
                digest.update(file.read(4096))
        found[one.path.name] = digest.hexdigest()
    return found


def _refuse_own_folder(source: Checkpoint, target: Path) -> None:
    """Refuse to write over what is read.

    Raises:
        ModelError: the checkpoint itself lies there.
    """
    if target.exists() and any(one.path.parent.resolve() == target.resolve() for one in source.files.values()):
        raise ModelError(f"{target}: the model itself lies there; choose another folder")


def _completed(complete: Callable[[Path], None], work: Path) -> None:
    """Complete a filled folder; what is refused goes, since it would be refused again."""
    try:
        complete(work / "files")
    except SteerError:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _filled(
    source: Checkpoint, made: Mapping[str, Made], work: Path, depends: Mapping[str, Any], shard_bytes: int
) -> tuple[tuple[str, ...], int, int, dict[str, str]]:
    """Fill the folder of files, going on behind those that are done: what changed, what did not, what was there."""
    metas = {name: source.like(name) for name in source.files} | {name: one.like for name, one in made.items()}
    changed = tuple(name for name in metas if name in made)
    planned = list(shards([Group((name,), {name: meta}) for name, meta in metas.items()], shard_bytes))
    names = shard_names(len(planned))
    folder, journal = work / "files", _journal(work, {**depends, "changed": list(changed), "files": names})
    folder.mkdir(exist_ok=True)
    done = _checked(journal, folder)
    resumed = len(done)
    for file, shard in zip(names, planned, strict=True):
        if file not in done:
            entries = {name: meta for group in shard for name, meta in group.entries.items()}
            done[file] = _write(source, made, entries, folder / file)
            journal.append([{"file": file, "sha256": done[file]}])
    write_index(planned, folder)
    _copy_beside(source, folder)
    record = json.dumps({**depends, "sha256": done}, indent=2, sort_keys=True) + "\n"
    (folder / RECORD).write_text(record, encoding="utf-8")
    return changed, len(metas) - len(changed), resumed, done


def _journal(work: Path, depends: Mapping[str, Any]) -> Journal:
    """The list of files that are done; one that was begun otherwise goes, with what it lists."""
    path = work / "done.jsonl"
    try:
        return Journal(path, depends)
    except DataError:
        path.unlink()
        shutil.rmtree(work / "files", ignore_errors=True)
        return Journal(path, depends)


def _checked(journal: Journal, folder: Path) -> dict[str, str]:
    """Files that are done and hold the bytes that were noted, with their digests; others are written again."""
    done = {}
    for row in journal.rows:
        path = folder / row["file"]
        if path.is_file() and _digest(path) == row["sha256"]:
            done[row["file"]] = row["sha256"]
    return done


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Hashed:
    """A file whose digest is taken while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)


def _write(source: Checkpoint, made: Mapping[str, Made], entries: Mapping[str, Tensor], path: Path) -> str:
    """One file, which appears when it is whole: its digest."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        hashed: Any = _Hashed(file)
        hashed.write(header(entries))
        for name, like in entries.items():
            for piece in _pieces(source, made, name):
                write_values(hashed, piece.to(like.dtype))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return str(hashed.digest.hexdigest())


def _pieces(source: Checkpoint, made: Mapping[str, Made], name: str) -> Iterable[Tensor]:
    """The tensor as it is to be, in pieces."""
    return made[name].pieces() if name in made else (rows for _, rows in in_rows(source, name))


def _copy_beside(source: Checkpoint, folder: Path) -> None:
    """Config, tokenizer and what else lies beside the weights; no weights of other formats."""
    for origin in _beside({one.path.parent for one in source.files.values()}):
        with contextlib.suppress(shutil.SameFileError):
            shutil.copyfile(origin, folder / origin.name)


def _beside(folders: Sequence[Path] | set[Path]) -> Iterator[Path]:
    for folder in sorted(folders):
        for path in sorted(folder.iterdir()):
            lower = path.name.lower()
            if path.is_file() and not lower.startswith(".") and lower not in _LEFT and not lower.endswith(_WEIGHTS):
                yield path
