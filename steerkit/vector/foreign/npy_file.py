"""`.npy`: one array of NumPy, a direction [d] or one for each of several blocks [n, d]."""

from __future__ import annotations

import io
import math
import warnings

import numpy
from numpy.lib import format as npy

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
    stream = io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, is_fortran, dtype = read(stream)
    except Exception as error:  # noqa: BLE001 - the header is Python's own syntax, so damage ends in any error
        said = " ".join(str(error).split())[:200]
        raise VectorFileError(f"damaged NumPy array ({type(error).__name__}: {said}); get it anew") from None
    if dtype.hasobject:
        raise VectorFileError("an array of Python objects, which is a pickle; pickles are never read")
    if dtype.kind not in "fiu":
        raise VectorFileError(f"an array of {dtype}; a direction consists of real numbers")
    # numpy.load sets aside what the header announces before it looks whether the file has it.
    present = len(data) - stream.tell()
    if math.prod(shape) * dtype.itemsize != present or len(shape) > 2:
        raise VectorFileError(
            f"damaged NumPy array: {present} bytes behind a header that says {list(shape)} of {dtype}; get it anew"
        )
    numbers = numpy.frombuffer(data, dtype=dtype, offset=stream.tell())
    found = numbers.reshape(shape, order="F" if is_fortran else "C")
    return Directions(Kind.NPY, {}, {"array": as_direction("the array", found)})
