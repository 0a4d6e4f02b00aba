"""What the readers share: JSON beside weights, tensors by name, and the errors where something is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from steerkit.errors import VectorFileError
from steerkit.network.sites import Site

__all__ = ["config_of", "known_site", "tensors_of", "wanted"]


def config_of(path: Path) -> dict[str, Any]:
    """A JSON object.

    Args:
        path: of the file.

    Raises:
        VectorFileError: there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VectorFileError(f"{path}: cannot be read as JSON ({error}); get the dictionary anew") from None
    if not isinstance(found, dict):
        raise VectorFileError(f"{path}: no JSON object; get the dictionary anew")
    return found


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, of any shape.

    Args:
        path: of the file.

    Raises:
        VectorFileError: there is none.
    """
    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise VectorFileError(f"{path}: cannot be read as safetensors ({error}); get the dictionary anew") from None
    return found


def wanted(path: Path, found: dict[str, Tensor], name: str) -> Tensor:
    """One tensor, of any shape.

    Args:
        path: of the file, for the message.
        found: its tensors.
        name: of the one.

    Raises:
        VectorFileError: it is not there.
    """
    if name not in found:
        raise VectorFileError(f"{path}: has no tensor {name!r} (it holds {', '.join(sorted(found)[:8])}); get it anew")
    return found[name]


def known_site(path: Path, said: Site | None, given: Site | None, where: str) -> Site:
    """Where a dictionary belongs: what the caller says, else what its files say.

    Args:
        path: of the dictionary, for the message.
        said: by its files; None where they name no site of steerkit's.
        given: by the caller.
        where: what the files name.

    Raises:
        VectorFileError: neither says.
    """
    site = said if given is None else given
    if site is None:
        raise VectorFileError(
            f"{path}: {where} names no site; give it, such as load_dictionary(path, site='resid_post.12')"
        )
    return site
