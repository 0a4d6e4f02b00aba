"""Safetensors files that are read by rows and not mapped: against the library, and every kind of damage."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steerkit.errors import ModelError
from steerkit.model.safetensors_file import SafetensorsFile

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.bfloat16).reshape(4, 3),
    "cube": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
    "scalar": torch.tensor(5),
    "none": torch.zeros(0, 3, dtype=torch.float16),
    "flags": torch.tensor([True, False]),
    "eighths": torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn),
}


def test_what_is_read_is_what_was_saved(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = SafetensorsFile.of(tmp_path / "a.safetensors")
    assert found.metadata == {"format": "pt"}
    assert set(found.entries) == set(TENSORS)
    for name, value in TENSORS.items():
        read = found.read(name)
        assert (read.dtype, read.shape) == (value.dtype, value.shape)
        assert torch.equal(
            read.view(torch.uint8) if read.dim() else read, value.view(torch.uint8) if read.dim() else value
        )
    assert torch.equal(found.rows("matrix", 1, 3), TENSORS["matrix"][1:3])
    assert torch.equal(found.rows("cube", 1, 2), TENSORS["cube"][1:2])
    assert found.rows("none", 0, 0).shape == (0, 3)
    starts = [entry.start for entry in found.entries.values()]
    assert starts == sorted(starts)


def of_header(said: Any, data: bytes = b"\0" * 8) -> bytes:
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 2**60) + b"{}",
        of_header(b"{no json"),
        of_header([1]),
        of_header({"a": 7}),
        of_header({"a": {**GOOD, "dtype": "F4"}}),
        of_header({"a": {**GOOD, "shape": [3]}}),
        of_header({"a": {**GOOD, "shape": [-2]}}),
        of_header({"a": {**GOOD, "data_offsets": [-8, 0]}}),
        of_header({"a": {**GOOD, "data_offsets": [0]}}),
        of_header({"a": GOOD}, b"\0" * 7),
    ],
)
def test_a_damaged_file_is_refused_in_a_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"a\.safetensors: is no whole safetensors file \(.+\); get it anew") as raised:
        SafetensorsFile.of(path)
    assert "\n" not in str(raised.value)


def test_a_file_that_becomes_shorter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(of_header({"a": GOOD}))
    found = SafetensorsFile.of(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="ended while it was read"):
        found.read("a")
