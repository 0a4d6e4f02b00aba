"""A pack: several vectors in one folder, listed as in a repository of the Hub, which it is once it is uploaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from steerkit._support.files import check_place, write_whole
from steerkit._support.hub import INDEX
from steerkit.errors import VectorFileError
from steerkit.vector.hub_pack import pack_index, vector_facts
from steerkit.vector.steering_vector import SteeringVector
from steerkit.vector.vector_files import write_vector_file

__all__ = ["check_pack", "save_pack"]


def check_pack(folder: str | Path) -> None:
    """Find out whether a pack could be written, before work is spent on what it would hold. Leaves nothing behind.

    Args:
        folder: where; it may be there, empty.

    Raises:
        VectorFileError: it is a file, it holds something, or nothing can be written there.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise VectorFileError(f"{target}: is a file; give the name of a folder")
    if target.is_dir() and any(target.iterdir()):
        raise VectorFileError(f"{target}: holds files already, which are not replaced; give another folder")
    check_place(target / INDEX, VectorFileError)


def save_pack(vectors: Mapping[str, SteeringVector], folder: str | Path) -> list[Path]:
    """Write vectors into a folder, each as a file of its name, with the list that the Hub's repositories have.

    Each file is written whole or not at all, the list last.

    Args:
        vectors: name to vector.
        folder: where; missing folders are made.

    Returns:
        The vectors' files, in their order.

    Raises:
        VectorFileError: it cannot be written there.
    """
    target, listed, files = Path(folder), {}, []
    for name, vector in vectors.items():
        data = vector.to_bytes()
        files.append(target / f"{name}.safetensors")
        write_vector_file(files[-1], data)
        listed[name] = vector_facts(vector, data)
    try:
        write_whole(target / INDEX, pack_index(listed))
    except OSError as error:
        raise VectorFileError(
            f"{target / INDEX}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    return files
