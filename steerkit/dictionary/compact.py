"""A dictionary in half the room: matrices rounded to bfloat16, in a file that any reader of dictionaries reads."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from steerkit._support.files import write_whole
from steerkit.dictionary.dictionary import Dictionary
from steerkit.errors import VectorFileError

__all__ = ["save_compact"]


def save_compact(dictionary: Dictionary, path: str | Path) -> Dictionary:
    """Write a dictionary with its encoder and decoder in bfloat16, whole or not at all.

    Args:
        dictionary: what is written.
        path: where; missing folders are made.

    Returns:
        What the file holds: the same with both matrices rounded. Its digest is that of the rounded numbers.

    Raises:
        VectorFileError: it cannot be written there.
    """
    rounded = replace(
        dictionary, encoder=dictionary.encoder.bfloat16().float(), decoder=dictionary.decoder.bfloat16().float()
    )
    with tempfile.TemporaryDirectory() as folder:
        whole = rounded.save(Path(folder) / "whole.safetensors")
        with safe_open(whole, framework="pt") as file:
            told = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    # A tensor that bfloat16 holds exactly loses nothing in it.
    half = {name: one.bfloat16() if torch.equal(one.bfloat16().float(), one) else one for name, one in tensors.items()}
    try:
        write_whole(Path(path), save(half, told))
    except OSError as error:
        raise VectorFileError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    return rounded
