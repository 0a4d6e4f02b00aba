"""`.svec`, the JSON of activation-steering (conditional activation steering): a direction for each layer.

Its number N names the block whose output the direction was read at, blocks counted from 0, which is `resid_post.N`.
That library adds it one place earlier, to what block N reads; here it is added where it was read. What it says of
explained variance is left out.
"""

from __future__ import annotations

import json

from torch import Tensor

from steerkit.errors import VectorFileError
from steerkit.vector.foreign.directions import Directions, as_direction
from steerkit.vector.foreign.kinds import Kind

__all__ = ["read_svec"]


def read_svec(data: bytes) -> Directions:
    """Read such a file.

    Args:
        data: the file, which `kind_of` has recognised.

    Raises:
        VectorFileError: a layer is no number, or its direction no list of numbers.
    """
    content = json.loads(data)
    by_layer: dict[int, Tensor] = {}
    for layer, value in content["directions"].items():
        if not layer.isdecimal():
            raise VectorFileError(f"directions: {layer[:80]!r} is no layer; they are numbers from 0")
        by_layer[int(layer)] = as_direction(f"directions, {layer}", value)
    if not by_layer:
        raise VectorFileError("a .svec file without a direction; get it anew")
    named = content.get("model_type")
    return Directions(Kind.SVEC, dict(sorted(by_layer.items())), {}, named if isinstance(named, str) else None, "all")
