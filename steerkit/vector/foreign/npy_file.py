"""`.npy`: one array of NumPy, a direction [d] or one for each of several blocks [n, d]."""

from __future__ import annotations

import io

import numpy

from steerkit.errors import VectorFileError
from steerkit.vector.foreign.directions import Directions, as_direction
from steerkit.vector.foreign.kinds import Kind

__all__ = ["read_npy"]


def read_npy(data: bytes) -> Directions:
    """Read an array; one that holds Python objects would be a pickle, and is refused.

    Args:
        data: the file.

    Raises:
        VectorFileError: it is damaged, or no array of numbers.
    """
    try:
        found = numpy.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        if "pickle" in str(error):
            raise VectorFileError("an array of Python objects, which is a pickle; pickles are never read") from None
        raise VectorFileError(f"damaged NumPy array ({error}); get it anew") from None
    return Directions(Kind.NPY, {}, {"array": as_direction("the array", found)})
