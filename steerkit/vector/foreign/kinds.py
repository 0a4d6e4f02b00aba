"""What a file is, told by its first bytes whatever its name says; nothing in it is executed."""

from __future__ import annotations

import io
import json
import zipfile
from enum import Enum

__all__ = ["Kind", "kind_of"]


class Kind(Enum):
    """What a file is; the value is what to call it."""

    SAFETENSORS = "a safetensors file"
    GGUF = "a GGUF file"
    SVEC = "a .svec file of activation-steering or AISteer360"
    NPY = "a NumPy array (.npy)"
    NPZ = "several NumPy arrays (.npz)"
    TORCH = "a file of torch.save (.pt)"
    PICKLE = "a pickle (.pkl, .bin)"
    ZIP = "a zip file"
    JSON = "JSON text"

    @property
    def can_be_imported(self) -> bool:
        """Whether `steerkit import` reads it."""
        return self in (Kind.SAFETENSORS, Kind.GGUF, Kind.SVEC, Kind.NPY, Kind.TORCH)


def kind_of(data: bytes) -> Kind | None:
    """What a file's content is; None where nothing tells.

    Args:
        data: the whole file.
    """
    if data[:4] == b"GGUF":
        return Kind.GGUF
    if data[:6] == b"\x93NUMPY":
        return Kind.NPY
    if data[:2] == b"PK":
        return _of_zip(data)
    # A header of 640 bytes begins with 0x80 too; what follows tells it from a pickle.
    if data[8:9] == b"{":
        return Kind.SAFETENSORS
    if data[:1] == b"\x80" and data[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return Kind.PICKLE
    return _of_text(data)


def _of_zip(data: bytes) -> Kind:
    """What a zip file is, by the names of what it holds."""
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except Exception:  # noqa: BLE001 - the library checks little, so damage ends in any error
        return Kind.TORCH  # cut short: what torch.save writes is the commonest by far
    if any(name.endswith(".pkl") for name in names):
        return Kind.TORCH
    return Kind.NPZ if names and all(name.endswith(".npy") for name in names) else Kind.ZIP


def _of_text(data: bytes) -> Kind | None:
    """What a text file is; None where it is no JSON."""
    if data[:64].lstrip()[:1] not in (b"{", b"["):
        return None
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return Kind.SVEC if isinstance(content, dict) and isinstance(content.get("directions"), dict) else Kind.JSON
