"""The bytes of a GGUF file, by the library that llama.cpp's own scripts write with, and onto the disk whole."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from steerkit._support.files import write_whole
from steerkit.errors import VectorFileError

__all__ = ["write_gguf"]


def write_gguf(
    path: Path, architecture: str, metadata: Mapping[str, str | int | float], tensors: Mapping[str, Tensor]
) -> None:
    """Write a GGUF file, whole or not at all; the same content gives the same bytes.

    Args:
        path: where; missing folders are made.
        architecture: what `general.architecture` says.
        metadata: further keys in their order; a whole number is stored as uint32, any other as float32.
        tensors: name to float32 tensor of any shape, in their order.

    Raises:
        VectorFileError: the file cannot be written there.
    """
    try:
        if path.is_dir():
            raise VectorFileError(f"{path}: is a folder; give the name of a file, such as {path / 'x.gguf'}")
        write_whole(path, _container(architecture, metadata, tensors))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VectorFileError(f"{path}: cannot be written ({reason}); choose another folder") from None


def _container(architecture: str, metadata: Mapping[str, str | int | float], tensors: Mapping[str, Tensor]) -> bytes:
    import gguf

    # The writer knows paths only, and makes its file bit by bit.
    with tempfile.TemporaryDirectory(prefix="steerkit-") as folder:
        path = Path(folder, "out.gguf")
        writer = gguf.GGUFWriter(path, architecture)
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        try:
            for name, value in metadata.items():
                add[type(value)](name, value)
            for name, tensor in tensors.items():
                writer.add_tensor(name, tensor.contiguous().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        return path.read_bytes()
