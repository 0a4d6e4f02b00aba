"""A dictionary's own file: safetensors, with one entry of metadata that holds all that is no tensor, as JSON.

With one entry only, the safetensors writer gives the same bytes for the same dictionary. The entry holds the digest of
the numbers, which is compared when the file is read. Nothing is unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from steerkit._support.files import write_whole
from steerkit.errors import SiteError, VectorFileError
from steerkit.network.sites import Site

if TYPE_CHECKING:
    from steerkit.dictionary.dictionary import Dictionary

__all__ = ["ENTRY", "read", "write"]

ENTRY = "steerkit_dictionary"
_FORMAT = 1


def write(dictionary: Dictionary, path: Path) -> Path:
    """Write a dictionary, whole or not at all.

    Args:
        dictionary: what is written.
        path: where; missing folders are made, a link stays a link.

    Returns:
        The path.

    Raises:
        VectorFileError: it cannot be written there, or its provenance is nothing that JSON can hold.
    """
    from steerkit.dictionary.dictionary import TENSORS

    facts = {
        **dictionary.facts(),
        "format": _FORMAT,
        "digest": dictionary.digest,
        "model_type": dictionary.model_type,
        "model_id": dictionary.model_id,
        "provenance": dict(dictionary.provenance),
    }
    tensors = {name: _narrowed(getattr(dictionary, name)) for name in TENSORS if getattr(dictionary, name) is not None}
    try:
        text = json.dumps(facts, ensure_ascii=False, sort_keys=True, allow_nan=False)
        write_whole(path, save(tensors, {ENTRY: text}))
    except (TypeError, ValueError) as error:
        raise VectorFileError(f"{path}: the dictionary's provenance cannot be stored ({error})") from None
    except OSError as error:
        raise VectorFileError(f"{path}: cannot be written ({error.strerror or error}); choose another folder") from None
    return path


def _narrowed(tensor: Tensor) -> Tensor:
    """A tensor in bfloat16 where that holds each of its numbers exactly, else as it is."""
    half = tensor.bfloat16()
    return half if torch.equal(half.float(), tensor) else tensor


def read(path: Path) -> dict[str, Any]:
    """Read a dictionary's file.

    Args:
        path: what `write` wrote.

    Returns:
        The fields of `Dictionary` by name.

    Raises:
        VectorFileError: there is no such file, or any of its numbers is not as it was written.
    """
    from steerkit.dictionary.dictionary import TENSORS, Dictionary

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(ENTRY)
            if text is None:
                raise VectorFileError(
                    f"{path}: no dictionary that steerkit saved, but another file of tensors; give a dictionary"
                )
            facts = json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys() if name in TENSORS}  # noqa: SIM118
        if facts.pop("format") != _FORMAT:
            raise VectorFileError(f"{path}: a newer format than this steerkit reads; pip install --upgrade steerkit-hf")
        digest = facts.pop("digest")
        fields = {**facts, **tensors, "site": Site.parse(facts["site"])}
        made = Dictionary(**fields)
    except FileNotFoundError:
        raise VectorFileError(f"{path}: no such file; give a dictionary that steerkit saved") from None
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, SiteError) as error:
        raise VectorFileError(f"{path}: damaged, or no dictionary ({error}); get it anew") from None
    if made.digest != digest:
        raise VectorFileError(f"{path}: altered file, its numbers do not match its digest; get it anew")
    return fields
