"""A checkpoint on the disk as a model that runs: each weight is read when its layer runs, and forgotten behind it.

In memory are the weights of one layer at a time. Files are read and not mapped, as `Checkpoint` does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import ModelError
from steerkit.export.checkpoint import in_files
from steerkit.export.weight_changes import QUANTISED
from steerkit.model.pretrained import first_line
from steerkit.model.quiet import quiet
from steerkit.monitor.checkpoints import Checkpoint
from steerkit.network.stand_in import without_weights

__all__ = ["Placed", "names_in_files", "opened", "tokenizer_of"]

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")


class Placed(Mapping[str, Tensor]):
    """The weights of a model by their names in it, read when they are asked for.

    Args:
        source: the checkpoint.
        places: name in the model to name in the files; one that is tied to another and not there has the other's.
    """

    def __init__(self, source: Checkpoint, places: Mapping[str, str]) -> None:
        self.source, self.places = source, places

    def __getitem__(self, name: str) -> Tensor:
        return self.source.read(self.places[name])

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def opened(source: Checkpoint) -> tuple[Any, Placed]:
    """Build the model of a checkpoint and leave its weights on the disk.

    Args:
        source: a checkpoint with its config.

    Returns:
        The model, in evaluation mode, offloaded as accelerate does it; and its weights.

    Raises:
        ModelError: there is no config of transformers, the weights are quantised, the model is code from outside of
            transformers, or its files lack a weight under the name and in the form in which the model has it.
    """
    from accelerate import cpu_offload

    config = _config(source)
    model: Any = without_weights(config, _dtype(source, config))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict()
    named = names_in_files(model, state)
    # Files may hold both of two tied weights. transformers then takes each as it is there, and unties what differs.
    places = {name: named[tied.get(name, name)] if place not in source else place for name, place in named.items()}
    for name, place in places.items():
        _check(source, place, state[name])
    weights = Placed(source, places)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
    return cpu_offload(model, torch.device("cpu"), state_dict=weights), weights


def names_in_files(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What files call the tensors of a model.

    Args:
        model: the transformers model.
        tensors: by their names in it, of any shape.

    Raises:
        ModelError: files hold one in pieces, or several as one.
    """
    given = {id(value): name for name, value in tensors.items()}
    found = {given[id(value)]: name for name, value in in_files(model, dict(tensors)).items() if id(value) in given}
    other = next((name for name in tensors if name not in found), None)
    if other is not None:
        raise ModelError(
            f"{type(model).__name__}: files hold {other} in another form than the model, which is not read from the "
            "disk; load the model and bake that"
        )
    return found


def tokenizer_of(source: Checkpoint) -> Any:
    """The tokenizer beside a checkpoint; None where there is none.

    Args:
        source: the checkpoint.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not any((source.folder / name).is_file() for name in _TOKENIZERS):
        return None
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{source.name}: its tokenizer cannot be loaded ({first_line(error)}); get it anew") from error


def _config(source: Checkpoint) -> Any:
    """The config of a checkpoint.

    Raises:
        ModelError: there is none, or it is of a quantised model or of one with code of its own.
    """
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"{source.name}: no config.json that transformers knows lies beside the weights ({first_line(error)}); "
            "give a whole folder"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{source.name}: is quantised, and {QUANTISED}")
    return config


def _dtype(source: Checkpoint, config: Any) -> torch.dtype:
    """In which precision transformers computes with a checkpoint: as its config says, else as its first weight."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    dtypes = (file.entries[name].dtype for name, file in source.files.items())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _check(source: Checkpoint, place: str, wanted: Tensor) -> None:
    """Refuse a weight that is not in the files as the model has it.

    Raises:
        ModelError: it lacks, has another shape, or is quantised.
    """
    if place not in source:
        raise ModelError(
            f"{source.name}: lacks {place}, under which save_pretrained writes it; load the model and bake that, or "
            "write it anew with save_pretrained"
        )
    held = source.like(place)
    if held.shape != wanted.shape:
        raise ModelError(
            f"{source.name}: {place} is {list(held.shape)} and the model's {list(wanted.shape)}; get it anew"
        )
    if wanted.is_floating_point() and not (held.is_floating_point() and held.itemsize > 1):
        raise ModelError(f"{source.name}: {place} is quantised ({held.dtype}); bake the unquantised model")
