"""Reading and writing the bytes of a vector file, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from steerkit._support.files import write_whole
from steerkit.errors import VectorFileError

__all__ = ["read_vector_file", "write_vector_file"]

MAX_FILE_BYTES = 4 * 2**30


def write_vector_file(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all; folders on the way are made.

    Args:
        path: where; a link stays a link.
        data: the content.

    Raises:
        VectorFileError: it cannot be written there.
    """
    try:
        target = path.resolve()  # a link stays a link
        if target.is_dir():
            raise VectorFileError(f"{path}: is a folder; give the name of a file, such as {path / 'x.safetensors'}")
        write_whole(target, data)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VectorFileError(f"{path}: cannot be written ({reason}); choose another folder") from None


def read_vector_file(path: Path, wanted: str = "a .safetensors file that steerkit saved") -> bytes:
    """Read a file that may be a vector.

    Args:
        path: a regular file.
        wanted: what it should be, for messages.

    Raises:
        VectorFileError: there is no such file, it is too large, or it cannot be read.
    """
    try:
        if path.is_dir():
            raise VectorFileError(f"{path}: is a folder; give {wanted}")
        if not path.exists():
            raise VectorFileError(f"{path}: no such file; give {wanted}")
        if not path.is_file():
            raise VectorFileError(f"{path}: is no regular file; give {wanted}")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise VectorFileError(f"{path}: {size} bytes are too many for a vector (at most {MAX_FILE_BYTES})")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VectorFileError(f"{path}: cannot be read ({reason})") from None
