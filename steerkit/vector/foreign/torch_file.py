"""Files of `torch.save` (.pt): tensors of steering-vectors, of persona vectors, of CAA, of hidden-directions.

Such a file is a zip of raw numbers and a pickle that says how they belong together. The pickle is first looked through
without running it: it may name what makes tensors and dicts and nothing else, and so a whole object of some program is
refused with its name. What passes is read by `torch.load(weights_only=True)`, whose restricted reader knows no other
names either. The file is mapped, because the reader that copies believes the lengths that stand in the pickle.

What is recognised: a tensor; a dict of tensors by name; a dict of directions by block, bare or under `directions` or
`layer_activations` (steering-vectors, which adds at block outputs and at all tokens); `bias` and `layer`, which
hidden-directions writes and adds at the MLP's output, in most families the same as at the block's.
"""

from __future__ import annotations

import io
import pickletools
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import VectorFileError
from steerkit.vector.container import MAX_TENSORS
from steerkit.vector.foreign.directions import Directions, as_direction, by_name, layer_number
from steerkit.vector.foreign.kinds import Kind

__all__ = ["read_torch"]

_MAKERS = frozenset(
    {
        "collections OrderedDict",
        "torch Size",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        *(f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char")),
    }
)
_DAMAGED = "damaged file of torch.save"


def read_torch(data: bytes, tensor: str | None) -> Directions:
    """Read the tensors of such a file. Nothing in it is executed.

    Args:
        data: the file.
        tensor: the name of the one that is meant, where they have names; None takes what there is.

    Raises:
        VectorFileError: it is damaged, holds more than tensors, lists and numbers, or nothing that is recognised.
    """
    _look_through(data)
    with tempfile.TemporaryDirectory(prefix="steerkit-") as folder:
        path = Path(folder, "tensors.pt")  # only what lies on a disk can be mapped
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # noqa: BLE001 - the library checks little, so damage ends in any error
            said = (str(error).splitlines() or [""])[0][:200]
            raise VectorFileError(f"{_DAMAGED} ({type(error).__name__}: {said}); get it anew") from None
        return _recognised(_copied(found, len(data)), tensor)


def _look_through(data: bytes) -> None:
    """Refuse a pickle that names anything but tensors.

    Raises:
        VectorFileError: it does, or the file is damaged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            # torch.save packs nothing, so what is packed may be of any size.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise VectorFileError(f"{_DAMAGED}: it is packed, which torch.save does not do; get it anew")
            (name,) = (entry for entry in entries if entry.filename.split("/")[-1] == "data.pkl")
            named = [
                argument
                for operation, argument, _ in pickletools.genops(archive.read(name))
                if operation.name in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
            ]
    except VectorFileError:
        raise
    except Exception as error:  # noqa: BLE001 - both libraries check little
        raise VectorFileError(f"{_DAMAGED} ({type(error).__name__}: {str(error)[:200]}); get it anew") from None
    for one in named:
        if one not in _MAKERS:
            what = str(one or "something")[:120].replace(" ", ".")
            raise VectorFileError(
                f"it holds {what}, an object and not only tensors, which would have to be unpickled; save its tensors "
                "alone, such as torch.save(vector.layer_activations, FILE)"
            )


def _copied(found: Any, most: int) -> Any:
    """What was read, its tensors no longer tied to the file.

    Raises:
        VectorFileError: its tensors hold more numbers than the file has bytes for, or there are too many.
    """
    left = [most, MAX_TENSORS]

    def copy(value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            left[0] -= value.numel() * value.element_size()
            left[1] -= 1
            if min(left) < 0 or value.layout != torch.strided or value.is_meta:
                raise VectorFileError(f"{_DAMAGED}: a tensor of shape {list(value.shape)[:8]} is more than it holds")
            return value.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(value, Mapping) and depth < 3:
            return {key: copy(inner, depth + 1) for key, inner in value.items()}
        return value

    return copy(found, 0)


def _recognised(found: Any, tensor: str | None) -> Directions:
    """Directions in what was read.

    Raises:
        VectorFileError: there are none in a form that is known.
    """
    if isinstance(found, Tensor):
        found = {"tensor": found}
    if not isinstance(found, Mapping) or not found:
        raise VectorFileError(f"it holds {type(found).__name__}; give a tensor, or a dict of tensors")
    inner = next((found[name] for name in ("layer_activations", "directions") if _is_by_layer(found.get(name))), None)
    if inner is not None or _is_by_layer(found):
        _check_place(found)
        placed = {int(layer): as_direction(f"layer {layer}", value) for layer, value in (inner or found).items()}
        return Directions(Kind.TORCH, dict(sorted(placed.items())), {}, None, None if inner is None else "all")
    layer = found.get("layer")
    if isinstance(found.get("bias"), Tensor) and type(layer) is int and layer >= 0:
        return Directions(Kind.TORCH, {layer: as_direction("bias", found["bias"])}, {}, None, "all")
    tensors = {str(name)[:200]: value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise VectorFileError("it holds no tensor; give a tensor, or a dict of tensors")
    return by_name(Kind.TORCH, tensors, tensor)


def _is_by_layer(value: Any) -> bool:
    """Whether this is a dict of tensors by the number of a block."""
    if not isinstance(value, Mapping) or not value:
        return False
    whole = (
        (type(key) is int and key >= 0) or (isinstance(key, str) and layer_number(key) is not None) for key in value
    )
    return all(whole) and all(isinstance(one, Tensor) for one in value.values())


def _check_place(found: Mapping[Any, Any]) -> None:
    place = found.get("layer_type", "decoder_block")
    if place != "decoder_block":
        raise VectorFileError(
            f"layer_type {str(place)[:40]!r}: these directions are added inside of blocks; only those of "
            "decoder_block, which are added at their outputs, can be imported"
        )
