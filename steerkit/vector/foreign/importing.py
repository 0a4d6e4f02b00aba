"""From another program's file to a `SteeringVector`: what the file holds, and what the model says of itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from steerkit.activations.recording import Item, record
from steerkit.errors import VectorFileError, VectorMismatchError
from steerkit.network.sites import Site, parse_layers
from steerkit.vector.foreign.directions import Directions
from steerkit.vector.foreign.gguf_file import read_gguf_vector
from steerkit.vector.foreign.kinds import Kind, kind_of
from steerkit.vector.foreign.npy_file import read_npy
from steerkit.vector.foreign.svec_file import read_svec
from steerkit.vector.foreign.tensor_file import read_tensors
from steerkit.vector.model_identity import model_facts
from steerkit.vector.steering_vector import SteeringVector
from steerkit.vector.vector_files import read_vector_file

__all__ = ["import_vector", "read_foreign"]


def read_foreign(path: str | Path, *, tensor: str | None = None) -> Directions:
    """What a file of another program holds. Nothing in it is executed.

    Args:
        path: a GGUF control vector, a .svec file, a .npy array or a safetensors file, told by content.
        tensor: of a safetensors file the name of the tensor that is meant.

    Raises:
        VectorFileError: there is no such file, it is of no such kind (pickles are never read), or damaged.
    """
    path = Path(path)
    data = read_vector_file(path)
    kind = kind_of(data)
    readers = {Kind.GGUF: read_gguf_vector, Kind.SVEC: read_svec, Kind.NPY: read_npy}
    try:
        if tensor is not None and kind is not Kind.SAFETENSORS:
            raise VectorFileError(f"tensor {tensor!r} of {kind.value if kind else 'this file'}; only safetensors have")
        if kind is Kind.SAFETENSORS:
            return read_tensors(data, tensor)
        if kind in readers:
            return readers[kind](data)
        if kind is Kind.PICKLE:
            raise VectorFileError(f"{kind.value}; pickles are never read, they can run code: save its tensor as .npy")
        what = kind.value if kind else "of no kind that is known"
        raise VectorFileError(f"{what}; give a GGUF control vector, .svec, .npy or safetensors")
    except VectorFileError as error:
        raise VectorFileError(f"{path}: {error}") from None


def import_vector(
    path: str | Path,
    model: nn.Module,
    tokenizer: Any,
    *,
    layers: str | Sequence[int] | None = None,
    tensor: str | None = None,
    neutral: Sequence[Item] = (),
) -> SteeringVector:
    """Make a vector of another program's file: a plain addition at block outputs, at strength 1 what the file holds.

    Args:
        path: see `read_foreign`.
        model: the model it was made for.
        tokenizer: its tokenizer.
        layers: blocks counted from 0 that the rows of an array belong to; of a file that says it, which are taken.
        tensor: of a safetensors file the name of the tensor that is meant.
        neutral: texts on which activation norms are measured, for strengths in unit `norm`.

    Returns:
        The vector, of method `caa`, with the file's name as its source.

    Raises:
        VectorFileError: see `read_foreign`; or the file does not say where its rows belong, and `layers` neither.
        VectorMismatchError: a direction is not as wide as the model, or of a block that the model has not.

    Warns:
        UserWarning: the file names another family of models, or a direction adds nothing.
    """
    found, facts = read_foreign(path, tensor=tensor), model_facts(model, tokenizer)
    depth, width = int(facts["num_layers"]), int(facts["hidden_size"])
    chosen = None if layers is None else parse_layers(layers, depth)
    try:
        directions = _placed(found, chosen, depth)
    except VectorFileError as error:
        raise VectorFileError(f"{path}: {error}") from None
    for layer, direction in directions.items():
        if direction.shape != (width,) or layer >= depth:
            raise VectorMismatchError(
                f"{path}: the direction of block {layer} has shape {list(direction.shape)}, this model blocks 0 to "
                f"{depth - 1} of width {width}; give the model it was made for"
            )
    if found.model_type not in (None, facts["model_type"]):
        warnings.warn(f"{path}: made for {found.model_type!r}, this is {facts['model_type']!r}", stacklevel=2)
    empty = [layer for layer, direction in sorted(directions.items()) if not bool(direction.any())]
    if empty:
        warnings.warn(f"{path}: the direction of block {empty[0]} has length 0 and adds nothing", stacklevel=2)
    sites = tuple(map(Site, sorted(directions)))
    scales = record(model, tokenizer, list(neutral), sites, readout="mean").scales if neutral else {}
    return SteeringVector(
        method="caa",
        tensors={f"{site}/direction": directions[site.layer] for site in sites},
        sites=sites,
        edit="add",
        scope=found.scope or "response",
        unit="paper",
        data_source=Path(path).name,
        norms={site: scale.norm for site, scale in scales.items()},
        spreads={site: scale.spread(directions[site.layer]) for site, scale in scales.items()},
        massive={site: scale.massive for site, scale in scales.items() if scale.massive},
        extra={"imported_from": found.kind.value},
        **facts,
    )


def _placed(found: Directions, chosen: Sequence[int] | None, depth: int) -> Mapping[int, Tensor]:
    """Directions by block.

    Raises:
        VectorFileError: nobody says where they belong.
    """
    if found.by_layer:
        missing = [layer for layer in chosen or () if layer not in found.by_layer]
        if missing:
            raise VectorFileError(f"no direction of block {missing[0]}; there are {_list(found.by_layer)}")
        return found.by_layer if chosen is None else {layer: found.by_layer[layer] for layer in chosen}
    if len(found.loose) > 1:
        names = ", ".join(list(found.loose)[:12])
        raise VectorFileError(f"{len(found.loose)} tensors ({names}); name the one that is meant (--tensor)")
    ((_, rows),) = found.loose.items()
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2:
        raise VectorFileError(f"an array of shape {list(rows.shape)}; give [d], or [n, d] for n blocks")
    if chosen is None and len(rows) == depth:
        chosen = range(depth)
    if chosen is None or len(chosen) != len(rows):
        got = "none given" if chosen is None else f"{len(chosen)} given"
        raise VectorFileError(f"{len(rows)} directions, and layers {got}; say the block of each (--layers 12)")
    return dict(zip(chosen, rows, strict=True))


def _list(layers: Mapping[int, Tensor]) -> str:
    named = list(layers)
    return f"{named[0]} to {named[-1]}" if len(named) > 2 else ", ".join(map(str, named))
