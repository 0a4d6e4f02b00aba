"""Altered files of other programs: a vector or the project's own error, in bounded memory, whatever was changed."""

from __future__ import annotations

import io
import json
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch

from steerkit.errors import VectorFileError
from steerkit.vector.foreign.importing import read_foreign
from tests.vector.test_foreign import as_gguf, draw

FEW, MANY = 150, 5000
MEGABYTES = 64  # what reading small files may add to the process at its highest


def _gguf(folder: Path) -> bytes:
    rows = draw(4, 16).numpy()
    return as_gguf(
        folder / "x", {f"direction.{n}": rows[n].astype(numpy.float16 if n == 2 else "f4") for n in range(1, 4)}
    ).read_bytes()


def _saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _npy() -> bytes:
    stream = io.BytesIO()
    numpy.save(stream, draw(4, 16).numpy())
    return stream.getvalue()


FILES: dict[str, Callable[[Path], bytes]] = {
    "gguf": _gguf,
    "svec": lambda _: json.dumps(
        {"model_type": "llama", "directions": {"1": draw(8).tolist(), "3": [[1, 2.5]]}}
    ).encode(),
    "npy": lambda _: _npy(),
    "safetensors": lambda _: safetensors.torch.save({"a.1": draw(16), "a.2": draw(16).half()}, {"k": "v"}),
    "matrix.pt": lambda _: _saved(draw(4, 16)),
    "layers.pt": lambda _: _saved({"layer_activations": {1: draw(16), 2: draw(16)}, "layer_type": "decoder_block"}),
}


def altered(data: bytes, chance: random.Random) -> bytes:
    """The file cut short, with bits flipped, with bytes or numbers of its header changed, or with a piece moved."""
    changed = bytearray(data)
    way = chance.randrange(6)
    if way == 0:
        return data[: chance.randrange(len(data))]
    if way == 1:
        for _ in range(chance.randint(1, 8)):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    elif way == 2:
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(min(len(changed), 512))] = chance.randrange(256)
    elif way == 3:
        at = chance.randrange(max(min(len(changed), 2048) - 8, 1))
        number = chance.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
        changed[at : at + 8] = number.to_bytes(8, "little")[: len(changed) - at]
    elif way == 4:
        start, end = sorted(chance.randrange(len(changed)) for _ in range(2))
        at = chance.randrange(len(changed))
        changed[at:at] = changed[start:end]
    else:
        start, end = sorted(chance.randrange(len(changed)) for _ in range(2))
        del changed[start : min(end, start + 64)]
    return bytes(changed)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _fuzz(kind: str, folder: Path, count: int) -> None:
    whole = FILES[kind](folder)
    path = folder / "altered"
    path.write_bytes(whole)
    read_foreign(path)  # as it is, it can be read
    chance, refused, before = random.Random(kind), 0, _peak()
    for _ in range(count):
        path.write_bytes(altered(whole, chance))
        try:
            found = read_foreign(path)
        except VectorFileError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 800, str(error)
        else:
            assert found.by_layer or found.loose
            assert all(bool(torch.isfinite(one).all()) for one in (*found.by_layer.values(), *found.loose.values()))
    assert refused > count / 4
    assert _peak() - before < MEGABYTES


@pytest.mark.parametrize("kind", FILES)
def test_altered_files(kind: str, tmp_path: Path) -> None:
    _fuzz(kind, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_many_altered_files(kind: str, tmp_path: Path) -> None:
    _fuzz(kind, tmp_path, MANY)
