"""GGUF control vectors: what llama.cpp, repeng and steerkit's own export write.

`direction.N` is added to the output of block N, blocks counted from 0, which is `resid_post.N`: no number is shifted
(see `steerkit.export.gguf`, where the loaders are followed line by line). Strength is part of the tensors.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy
from torch import Tensor

from steerkit.errors import VectorFileError
from steerkit.vector.foreign.directions import Directions, as_direction
from steerkit.vector.foreign.kinds import Kind

__all__ = ["read_gguf_vector"]

_ARCHITECTURE = "controlvector"


def read_gguf_vector(data: bytes) -> Directions:
    """Read a control vector.

    Args:
        data: the file.

    Raises:
        VectorFileError: it holds something else, such as a model, or is damaged.
    """
    import gguf

    # The reader knows paths only.
    with tempfile.TemporaryDirectory(prefix="steerkit-") as folder:
        path = Path(folder, "vector.gguf")
        path.write_bytes(data)
        try:
            reader = gguf.GGUFReader(path)
            found = {tensor.name: numpy.array(tensor.data) for tensor in reader.tensors}
            fields = {
                name: str(field.contents())
                for name in ("general.architecture", f"{_ARCHITECTURE}.model_hint")
                if (field := reader.get_field(name)) is not None
            }
            del reader  # it holds the file open
        except Exception as error:  # noqa: BLE001 - the library checks little, so damage ends in any error
            raise VectorFileError(f"damaged GGUF file ({type(error).__name__}: {error}); get it anew") from None
    architecture = fields.get("general.architecture", "nothing")
    if architecture != _ARCHITECTURE:
        raise VectorFileError(f"a GGUF file of {architecture!r}, no control vector; a model is given with --model")
    by_layer: dict[int, Tensor] = {}
    for name, value in found.items():
        word, _, layer = name.partition(".")
        if word != "direction" or not layer.isdecimal():
            raise VectorFileError(f"tensor {name[:80]!r} is no direction.N; a control vector holds nothing else")
        if value.ndim != 1 or value.dtype not in (numpy.float32, numpy.float16, numpy.float64):
            raise VectorFileError(f"tensor {name!r}: {value.dtype} of shape {list(value.shape)}; expected floats [d]")
        by_layer[int(layer)] = as_direction(name, value)
    if not by_layer:
        raise VectorFileError("a GGUF control vector without a direction; get it anew")
    hint = fields.get(f"{_ARCHITECTURE}.model_hint")
    return Directions(Kind.GGUF, dict(sorted(by_layer.items())), {}, hint or None, "all")
