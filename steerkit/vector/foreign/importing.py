"""From another program's file to a `SteeringVector`: what the file holds, and what the model says of itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from steerkit.activations.recording import Item, record
from steerkit.errors import VectorFileError, VectorMismatchError
from steerkit.network.sites import parse_layers
from steerkit.vector.foreign.directions import Directions
from steerkit.vector.foreign.gguf_file import read_gguf_vector
from steerkit.vector.foreign.kinds import Kind, kind_of
from steerkit.vector.foreign.npy_file import read_npy
from steerkit.vector.foreign.svec_file import read_svec
from steerkit.vector.foreign.tensor_file import read_tensors
from steerkit.vector.foreign.torch_file import read_torch
from steerkit.vector.model_identity import model_facts
from steerkit.vector.steering_vector import SteeringVector
from steerkit.vector.vector_files import read_vector_file

__all__ = ["import_vector", "read_foreign"]


def read_foreign(path: str | Path, *, tensor: str | None = None) -> Directions:
    """What a file of another program holds. Nothing in it is executed.

    Args:
        path: a GGUF control vector, a .svec file, a .npy array, or tensors in a file of safetensors or of `torch.save`,
            told by content.
        tensor: of a file of named tensors the one that is meant.

    Raises:
        VectorFileError: there is no such file, it is of no such kind (pickles are never read), or damaged.
    """
    path = Path(path)
    data = read_vector_file(path, "a vector file of another program")
    kind = kind_of(data)
    named = {Kind.SAFETENSORS: read_tensors, Kind.TORCH: read_torch}
    others = {Kind.GGUF: read_gguf_vector, Kind.SVEC: read_svec, Kind.NPY: read_npy}
    try:
        if kind in named:
            return named[kind](data, tensor)
        if tensor is not None:
            raise VectorFileError(
                f"tensor {tensor!r} of {kind.value if kind else 'this file'}; its tensors have no names"
            )
        if kind in others:
            return others[kind](data)
        if kind is Kind.PICKLE:
            raise VectorFileError(
                f"{kind.value}; these are never read, they can run code: save its tensors by torch.save, or as .npy"
            )
        what = kind.value if kind else "of no kind that is known"
        raise VectorFileError(f"{what}; give a GGUF control vector, .svec, .pt, .npy or safetensors")
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
        layers: blocks counted from 0. Of a file that says where its directions belong, or of an array with a row for
            each block, those that are taken; of another array, those that its rows belong to, in their order.
        tensor: of a file of named tensors the one that is meant.
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
    depth = int(facts["num_layers"])
    chosen = None if layers is None else parse_layers(layers, depth)
    try:
        placed = _placed(found, chosen, depth)
        vector = SteeringVector.from_directions(
            placed, model, tokenizer, scope=found.scope or "response", data_source=Path(path).name
        )
    except (VectorFileError, VectorMismatchError) as error:
        raise type(error)(f"{path}: {error}") from None
    if found.model_type not in (None, facts["model_type"]):
        warnings.warn(f"{path}: made for {found.model_type!r}, this is {facts['model_type']!r}", stacklevel=2)
    scales = record(model, tokenizer, list(neutral), vector.sites, readout="mean").scales if neutral else {}
    return replace(
        vector,
        norms={site: scale.norm for site, scale in scales.items()},
        spreads={site: scale.spread(placed[site.layer]) for site, scale in scales.items()},
        massive={site: scale.massive for site, scale in scales.items() if scale.massive},
        extra={"imported_from": found.kind.value},
    )


def _placed(found: Directions, chosen: Sequence[int] | None, depth: int) -> Mapping[int, Tensor]:
    """Directions by block.

    Raises:
        VectorFileError: nobody says where they belong.
    """
    by_layer = found.by_layer or _rows_by_layer(found.loose, chosen, depth)
    missing = [layer for layer in chosen or () if layer not in by_layer]
    if missing:
        raise VectorFileError(f"no direction of block {missing[0]}; there are {_list(by_layer)}")
    return by_layer if chosen is None else {layer: by_layer[layer] for layer in chosen}


def _rows_by_layer(loose: Mapping[str, Tensor], chosen: Sequence[int] | None, depth: int) -> Mapping[int, Tensor]:
    """The rows of an array by the block that they belong to.

    Raises:
        VectorFileError: nobody says where they belong.
    """
    if len(loose) > 1:
        names = ", ".join(list(loose)[:12])
        raise VectorFileError(f"{len(loose)} tensors ({names}); name the one that is meant (--tensor)")
    ((_, rows),) = loose.items()
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2:
        raise VectorFileError(f"an array of shape {list(rows.shape)}; give [d], or [n, d] for n blocks")
    if chosen is not None and len(chosen) == len(rows):
        return dict(zip(chosen, rows, strict=True))
    if len(rows) == depth + 1:
        rows = rows[1:]  # transformers' hidden states, which begin with the embeddings: persona vectors are kept so
    if len(rows) == depth:
        return dict(enumerate(rows))
    got = "none given" if chosen is None else f"{len(chosen)} given"
    raise VectorFileError(f"{len(rows)} directions, and layers {got}; say the block of each (--layers 12)")


def _list(layers: Mapping[int, Tensor]) -> str:
    named = list(layers)
    return f"{named[0]} to {named[-1]}" if len(named) > 2 else ", ".join(map(str, named))
