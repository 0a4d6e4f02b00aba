"""Weights of a checkpoint on the disk, a tensor or some of its rows at a time, without a model; safetensors only.

Files are read and not mapped: what is mapped counts as memory of the process wherever its size is limited.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steerkit.errors import ModelError
from steerkit.model.aliases import ALIASES, embedded_gguf
from steerkit.model.conversion import converted
from steerkit.model.pretrained import first_line
from steerkit.model.safetensors_file import SafetensorsFile
from steerkit.monitor.adapters import ADAPTER

__all__ = ["Checkpoint"]

_INDEX = "model.safetensors.index.json"
_TOKENIZER = ("*.jinja", "*.model", "*.txt")
"""What lies beside weights and is neither these nor JSON: a checkpoint that is made of them takes it over."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_WIDTHS = ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Where the tensors of a checkpoint are.

    Attributes:
        name: what it was asked for as.
        files: tensor name to the file that holds it, in the order of the files and of their bytes.
        width: of the residual stream, as its config says; None where there is none that says so.
    """

    name: str
    files: Mapping[str, SafetensorsFile]
    width: int | None

    @classmethod
    def of(cls, name: str) -> Checkpoint:
        """Find a checkpoint.

        Args:
            name: a folder, a .safetensors file, an alias of a model that is installed, or a name on the hub, from which
                its safetensors are then downloaded.

        Raises:
            ModelError: it is nowhere, holds no safetensors (pickles are never read), is an adapter, or is damaged.
        """
        path = Path(name)
        if path.is_file():
            return cls._of_files(name, path.parent, [path])
        folder = path if path.is_dir() else _folder_of(name)
        files = sorted(folder.glob("*.safetensors"))
        if (folder / _INDEX).exists():
            files = _indexed(folder)
        elif (folder / ADAPTER).exists():
            raise ModelError(
                f"{name}: is an adapter, which changes weights only together with its model; merge it first "
                "(PeftModel.merge_and_unload, then save_pretrained)"
            )
        if not files:
            pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
            held = f"only {pickles[0]}, a pickle, which could run code" if pickles else "none"
            raise ModelError(
                f"{name}: safetensors are read, and there is {held}; load it where you trust it and write it anew with "
                "save_pretrained"
            )
        return cls._of_files(name, folder, files)

    @classmethod
    def _of_files(cls, name: str, folder: Path, files: list[Path]) -> Checkpoint:
        if not all(file.suffix == ".safetensors" for file in files):
            raise ModelError(
                f"{name}: is no safetensors file; pickles are not read, write it anew with save_pretrained"
            )
        where = {tensor: file for file in map(SafetensorsFile.of, files) for tensor in file.entries}
        return cls(name, where, _width(folder / "config.json"))

    @property
    def folder(self) -> Path:
        """Where it lies; a checkpoint without tensors lies nowhere, and has none."""
        return next(iter(self.files.values())).path.parent

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.files

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read for it.

        Args:
            tensor: its name.
        """
        return self.files[tensor].entries[tensor].shape

    def like(self, tensor: str) -> Tensor:
        """An empty tensor [...] of the shape and dtype of one, on the meta device.

        Args:
            tensor: its name.
        """
        entry = self.files[tensor].entries[tensor]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def read(self, tensor: str) -> Tensor:
        """A tensor as it is stored, [...].

        Args:
            tensor: its name.
        """
        return self.files[tensor].read(tensor)


def _folder_of(name: str) -> Path:
    """The folder with the weights of an alias or of a name on the hub.

    Raises:
        ModelError: it cannot be had.
    """
    if name in ALIASES:
        pieces = embedded_gguf(ALIASES[name])
        if pieces:
            return converted(name, pieces, sha256=ALIASES[name].sha256)
        raise ModelError(f"{name}: is not installed; {ALIASES[name].install}")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", *_TOKENIZER]))
    except Exception as error:
        raise ModelError(
            f"{name}: no folder, and not to be had from the hub ({first_line(error)}); short names are "
            f"{', '.join(sorted(ALIASES))}"
        ) from error


def _indexed(folder: Path) -> list[Path]:
    """The files that an index lists, each of them inside of the folder.

    Raises:
        ModelError: it is no index, or one of them is not there.
    """
    try:
        listed = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / Path(str(file)).name for file in listed]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{folder / _INDEX}: is no index of weights; get it anew") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{folder}: lacks {missing[0]}, which its index lists; get it anew")
    return files


def _width(config: Path) -> int | None:
    """The width of the residual stream by a config; None where it does not say."""
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    for part in (said.get("text_config"), said) if isinstance(said, dict) else ():
        found = [part[key] for key in _WIDTHS if isinstance(part, dict) and isinstance(part.get(key), int)]
        if found:
            return int(found[0])
    return None
