"""The tensors of a vector: copied once and for all, and checked; those of a file wait there until somebody asks.

A vector can be read, checked and described without torch, which takes longer to load than all of that: its numbers are
kept as bytes, and become tensors of torch when they are first asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import deserialize

from steerkit.errors import VectorFileError
from steerkit.vector.container import MAX_DIMENSIONS, MAX_TENSORS

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from steerkit.network.sites import Site

__all__ = ["Stored", "Tensors", "checked_tensors", "direction_length"]

# What torch and numpy call the dtypes of safetensors; numpy has no bfloat16, the upper half of a float32.
_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U8": "uint8",
        "BOOL": "bool",
    }
)


class Stored(NamedTuple):
    """One tensor as a file has it.

    Attributes:
        dtype: under safetensors' name.
        shape: of the tensor.
        data: its bytes; whoever changes a tensor made of them changes them.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytearray | memoryview

    def numbers(self) -> ndarray[Any, Any]:
        """The numbers, of the tensor's shape; bfloat16 as float32."""
        import numpy as np

        if self.dtype == "BF16":
            halves = np.frombuffer(self.data, dtype=np.uint16).astype(np.uint32)
            return (halves << 16).view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, dtype=_NAMES[self.dtype]).reshape(self.shape)

    def tensor(self) -> Tensor:
        """The tensor, of the same shape and memory."""
        import numpy as np
        import torch

        with torch.inference_mode(mode=False):  # a tensor made in inference mode could not be trained through later
            plain = torch.from_numpy(np.frombuffer(self.data, dtype=np.uint8))
            return plain.view(getattr(torch, _NAMES[self.dtype])).reshape(self.shape)


class Tensors(Mapping[str, "Tensor"]):
    """Tensors by name, made when they are first asked for.

    Attributes:
        stored: name to what a file has of each, in the order of the names.
    """

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored: Mapping[str, Stored] = MappingProxyType({name: stored[name] for name in sorted(stored)})
        self._made: dict[str, Tensor] = {}

    @classmethod
    def of_file(cls, data: bytes) -> Tensors:
        """The tensors in a safetensors file.

        Args:
            data: the file.

        Raises:
            SafetensorError: it is none.
        """
        entries = deserialize(data)  # type: ignore[no-untyped-call]
        return cls({name: Stored(one["dtype"], tuple(one["shape"]), one["data"]) for name, one in entries})

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            self._made[name] = self.stored[name].tensor()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def checked_tensors(tensors: Mapping[str, Any], widths: Mapping[Site, int]) -> Tensors:
    """Copies of the tensors of a vector; those of a file or of another vector are checked and not copied.

    Args:
        tensors: ``"<site>/<param>"`` and ``"shared/<param>"`` to tensor, of any shape and a known dtype.
        widths: of each of the vector's sites, in order.

    Raises:
        VectorFileError: too many, a wrong name, dtype, shape or value, or a site without any.
    """
    if not 1 <= len(tensors) <= MAX_TENSORS:
        raise VectorFileError(f"a vector holds 1 to {MAX_TENSORS} tensors, not {len(tensors)}")
    owners = {str(site): (site,) for site in widths} | {"shared": tuple(widths)}
    given: Mapping[str, Any] = tensors.stored if isinstance(tensors, Tensors) else tensors
    kept: dict[str, Stored] = {}
    for name in sorted(given):
        owner, slash, param = name.partition("/")
        if not slash or owner not in owners or re.fullmatch(r"[A-Za-z0-9_.-]+", param) is None:
            listed = ", ".join(owners)
            raise VectorFileError(f"tensor {name!r}: its name must be <site>/<param>, the site one of {listed}")
        kept[name] = _own_copy(name, given[name])
        if param == "direction":
            for site in owners[owner]:
                _check_direction(name, kept[name], widths[site])
    present = {name.partition("/")[0] for name in kept}
    for site in widths:
        if present.isdisjoint((str(site), "shared")):
            raise VectorFileError(f"{site}: the vector holds no tensor for this site")
    return tensors if isinstance(tensors, Tensors) else Tensors(kept)


def _own_copy(name: str, tensor: Any) -> Stored:
    """A copy of one tensor that nobody else holds; what a file has of one is checked and not copied.

    Raises:
        VectorFileError: no tensor, an unknown dtype, no numbers, too many dimensions, or one is not finite.
    """
    kept = tensor if isinstance(tensor, Stored) else _copied(name, tensor)
    if len(kept.data) == 0 or len(kept.shape) > MAX_DIMENSIONS:
        raise VectorFileError(f"{name} has shape {list(kept.shape)}; it must hold numbers in 0 to 8 dimensions")
    if not _is_finite(kept):
        raise VectorFileError(f"{name} is not finite; fit again in float32 or bfloat16")
    return kept


def _copied(name: str, tensor: Any) -> Stored:
    """A tensor as it is stored: checked, copied, on the CPU."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise VectorFileError(f"{name} is {type(tensor).__name__}, not a tensor")
    dtypes = {getattr(torch, known): code for code, known in _NAMES.items()}
    if tensor.dtype not in dtypes:
        raise VectorFileError(f"{name} has dtype {tensor.dtype}; allowed are floats, integers and bool")
    copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return Stored(dtypes[tensor.dtype], tuple(tensor.shape), copy.reshape(-1).view(torch.uint8).numpy().data)


def _is_finite(stored: Stored) -> bool:
    import numpy as np

    return stored.dtype not in ("F64", "F32", "F16", "BF16") or bool(np.isfinite(stored.numbers()).all())


def _check_direction(name: str, direction: Stored, width: int) -> None:
    """Refuse a direction that is not as wide as its site: [d] or [k, d].

    Raises:
        VectorFileError: it has another shape.
    """
    if len(direction.shape) not in (1, 2) or direction.shape[-1] != width:
        raise VectorFileError(f"{name} has shape {list(direction.shape)}; it must be [{width}] or [k, {width}]")


def direction_length(direction: Stored | None) -> float | None:
    """The norm of a direction; of several, the median of those that are not zero, the lower one of two.

    Args:
        direction: of shape [d] or [k, d]; None has no norm.
    """
    import numpy as np

    if direction is None:
        return None
    norms = np.linalg.norm(direction.numbers().astype(np.float64), axis=-1).reshape(-1)
    found = sorted(float(norm) for norm in norms if norm > 0)
    return found[(len(found) - 1) // 2] if found else 0.0
