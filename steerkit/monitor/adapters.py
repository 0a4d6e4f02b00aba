"""What a LoRA on the disk adds to the weights of its base, without the base and without peft."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steerkit.errors import ModelError
from steerkit.model.safetensors_file import SafetensorsFile

__all__ = ["ADAPTER", "AdapterDifference"]

ADAPTER = "adapter_config.json"
_PAIR = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_PLAIN = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "lora_bias": False,
    "trainable_token_indices": None,
}

_MOVES_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways to begin a LoRA that change the weights beside it as well."""


class AdapterDifference:
    """What a LoRA adds, B A times its scale, kept as the two factors.

    Args:
        folder: what PEFT's `save_pretrained` wrote.

    Attributes:
        name: the folder.
        digest: of its weights and its config.

    Raises:
        ModelError: it is no LoRA, changes more than products of two matrices can (DoRA, biases, whole modules), or is
            damaged.
    """

    def __init__(self, folder: Path) -> None:
        config = _adapter_config(folder)
        self.name = str(folder)
        file = SafetensorsFile.of(folder / "adapter_model.safetensors")
        sides: dict[str, dict[str, str]] = {}
        for name in file.entries:
            found = _PAIR.match(name)
            if found is None:
                raise ModelError(f"{folder}: {name} is no part of a plain LoRA; merge the adapter into its model first")
            sides.setdefault(found["module"], {})[found["side"]] = name
        self.digest = hashlib.sha256(file.path.read_bytes() + json.dumps(config, sort_keys=True).encode()).hexdigest()
        self.left_out: Mapping[str, str] = {}
        self._transposed = bool(config.get("fan_in_fan_out"))
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        for module, names in sides.items():
            if set(names) != {"A", "B"}:
                raise ModelError(f"{folder}: {module} has lora_{next(iter(names))} and not the other; get it anew")
            a, b = (file.read(names[side]).float() for side in "AB")
            if a.dim() != 2 or b.dim() != 2:
                raise ModelError(f"{folder}: {module} is no linear layer; merge the adapter into its model first")
            self._factors[f"{module}.weight"] = a, b * _scale(config, module, len(a))

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to shape of what differs."""
        sizes = {name: (len(b), a.shape[1]) for name, (a, b) in self._factors.items()}
        return {name: (i, o) if self._transposed else (o, i) for name, (o, i) in sizes.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of what is added to a tensor, [stop - start, i] float32.

        Args:
            name: one of `shapes`.
            start: the first row.
            stop: the row behind the last.
        """
        a, b = self._factors[name]
        return (b @ a[:, start:stop]).T if self._transposed else b[start:stop] @ a


def _adapter_config(folder: Path) -> dict[str, Any]:
    """The config of a plain LoRA.

    Raises:
        ModelError: it is none.
    """
    try:
        config: dict[str, Any] = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"{folder / ADAPTER}: is no config of an adapter; get it anew") from None
    wrong = next((name for name, plain in _PLAIN.items() if config.get(name, plain) not in (plain, [])), None)
    if str(config.get("init_lora_weights")).startswith(_MOVES_BASE):
        wrong = "init_lora_weights"
    if kind != "LORA" or wrong is not None:
        what = f"{wrong}={config.get(wrong)!r}" if wrong is not None else f"a {kind}"
        raise ModelError(f"{folder}: {what} is more than a plain LoRA; merge the adapter into its model first")
    return config


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What B A is multiplied by at a module, by PEFT's rules; patterns are matched as PEFT does."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
