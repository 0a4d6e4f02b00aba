"""Which weights a model holds: their digest, and how small they were made before they came here.

A file of 4 bits that is unpacked to float32 computes like a full-precision model and is none: its weights are the
rounded ones. Cards, adapters, baked folders and measured figures say so, all through `weights_of`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

__all__ = ["SOURCE", "Weights", "weights_digest", "weights_of"]

SAMPLES = 256
SOURCE = "source.json"
"""Beside a converted folder: which file it was made of, and in which precision that holds its weights."""


@dataclass(frozen=True)
class Weights:
    """Which weights a model holds.

    Attributes:
        digest: see `weights_digest`.
        dtype: what is computed with.
        quantisation: how the weights were rounded, such as ``Q4_1 (GGUF)`` or ``4 bit (bitsandbytes)``; None where
            nothing says that they were.
    """

    digest: str
    dtype: str
    quantisation: str | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        rounded = "not quantised" if self.quantisation is None else f"{self.quantisation}, unpacked"
        if self.quantisation is not None and "GGUF" not in self.quantisation:
            rounded = self.quantisation
        return f"{rounded}; computed in {self.dtype}; digest `{self.digest[:16]}`"


def weights_of(model: nn.Module) -> Weights:
    """Say which weights a model holds.

    Args:
        model: a transformers model.
    """
    parameter = next(model.parameters(), None)
    dtype = getattr(model, "dtype", None) or getattr(parameter, "dtype", "")
    return Weights(weights_digest(model), str(dtype).removeprefix("torch."), _quantisation(model))


def weights_digest(model: nn.Module) -> str:
    """Digest of the weights: of every parameter its name, shape, precision and up to 256 of its numbers.

    Another checkpoint, precision or finetuned layer changes it; it takes milliseconds whatever the model's size.

    Args:
        model: the model.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":  # offloaded: nothing to look at
            for flat in _plain(parameter.detach()):
                digest.update(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _plain(weight: Tensor) -> Iterator[Tensor]:
    """The flat numbers of a weight; of one that a quantiser packed (torchao), those of the tensors inside it."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight.flatten()
        return
    names, _ = weight.__tensor_flatten__()
    for name in names:
        yield from _plain(getattr(weight, name))


def _quantisation(model: nn.Module) -> str | None:
    """How weights are quantised, in words; None where they are not."""
    config: Any = getattr(model, "config", None)
    found = getattr(config, "quantization_config", None)
    if found is not None:
        plain = found if isinstance(found, dict) else found.to_dict()
        bits = 4 if plain.get("load_in_4bit") else 8 if plain.get("load_in_8bit") else plain.get("bits")
        method = getattr(plain.get("quant_method"), "value", plain.get("quant_method")) or "unknown"
        return f"{bits} bit ({method})" if bits else str(method)
    name = getattr(config, "_name_or_path", "") or ""
    try:
        source = json.loads((Path(name).parent / SOURCE).read_text(encoding="utf-8"))
        kind = source["quantisation"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if kind in (None, "F32", "F16", "BF16") else f"{kind} (GGUF)"
