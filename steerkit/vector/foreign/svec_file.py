"""`.svec`, the JSON of activation-steering (conditional activation steering) and of AISteer360: a direction by layer.

The number N of a layer names the block whose output the direction was read at, blocks counted from 0, which is
`resid_post.N`. activation-steering writes lists of d numbers, and adds them one place earlier, to what block N reads;
here they are added where they were read. AISteer360 writes [1, d] and adds at the block's output. What it writes for
one token after another, [t, d], has no place in a plain addition. What both say of explained variance is left out.
"""

from __future__ import annotations

import json

from torch import Tensor

from steerkit.errors import VectorFileError
from steerkit.vector.foreign.directions import Directions, as_direction, layer_number
from steerkit.vector.foreign.kinds import Kind

__all__ = ["read_svec"]


def read_svec(data: bytes) -> Directions:
    """Read such a file.

    Args:
        data: the file, which `kind_of` has recognised.

    Raises:
        VectorFileError: a layer is no number, or its direction no list of numbers, or one for each of several tokens.
    """
    content = json.loads(data)
    by_layer: dict[int, Tensor] = {}
    is_nested = False
    for name, value in content["directions"].items():
        layer = layer_number(name)
        if layer is None:
            raise VectorFileError(f"directions: {name[:80]!r} is no layer; they are numbers from 0")
        direction = as_direction(f"directions, {layer}", value)
        is_nested |= direction.dim() > 1
        if direction.dim() > 2 or (direction.dim() == 2 and len(direction) > 1):
            raise VectorFileError(
                f"directions, {layer}: shape {list(direction.shape)}, one direction for each of several tokens; a "
                "plain addition has one, so import a file of one"
            )
        by_layer[layer] = direction.reshape(-1)
    if not by_layer:
        raise VectorFileError("a .svec file without a direction; get it anew")
    named = content.get("model_type")
    family = named[:80] if isinstance(named, str) else None
    # AISteer360 leaves the tokens to whoever applies the file; activation-steering adds at all of them.
    return Directions(Kind.SVEC, dict(sorted(by_layer.items())), {}, family, None if is_nested else "all")
