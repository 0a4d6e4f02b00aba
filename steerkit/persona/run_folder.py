"""The folder of an extraction: one run at a time works in it, and the specification stays beside what came of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from steerkit.errors import DataError
from steerkit.persona.traits import TraitSpec, slug

__all__ = ["alone_in", "keep_spec"]


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the operating system frees the lock of one that was killed.

    Args:
        folder: made where it is not there.

    Raises:
        DataError: another run is at work in it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise DataError(f"{folder}: another run is at work in it; wait, or choose another folder") from None
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        yield
    finally:
        lock.release()


def keep_spec(spec: TraitSpec, folder: Path) -> None:
    """Write the specification beside its results; a file of that name with other content is left alone.

    Args:
        spec: of the trait.
        folder: of the run.
    """
    path = folder / f"{slug(spec.trait)}.toml"
    if path.exists():
        with contextlib.suppress(DataError):
            if TraitSpec.load(path).digest == spec.digest:
                return
        path = folder / f"{slug(spec.trait)}-extracted.toml"
    spec.save(path)
