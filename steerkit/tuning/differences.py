"""What finetuning has changed, tensor by tensor: between two checkpoints, by an adapter's folder, between state dicts.

Every difference is float32. Only floating-point tensors count; integers and flags are left alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from steerkit.errors import ModelError
from steerkit.model.safetensors_file import SafetensorsFile
from steerkit.monitor.checkpoints import Checkpoint

__all__ = ["ADAPTER", "AdapterDifference", "CheckpointDifference", "Difference", "StateDifference"]

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


class Difference(Protocol):
    """Differences of some tensors, which are computed when they are asked for."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to shape of what differs."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """Name to why a tensor, or a part of it, does not count."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a difference, float32.

        Args:
            name: one of `shapes`.
            start: the first row.
            stop: the row behind the last.

        Returns:
            [stop - start, ...]; of a tensor without dimensions [1].
        """


@dataclass(frozen=True, eq=False)
class CheckpointDifference:
    """Finetuned minus base, read from the disk as it is asked for.

    Args:
        base: the model as it was.
        tuned: the same architecture, finetuned.

    Raises:
        ModelError: they share no tensor, or one has another shape in more than the number of its rows.
    """

    base: Checkpoint
    tuned: Checkpoint
    shapes: Mapping[str, tuple[int, ...]] = field(init=False)
    left_out: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        shapes, left_out = dict[str, tuple[int, ...]](), dict[str, str]()
        for name in dict.fromkeys([*self.base.files, *self.tuned.files]):
            lacking = next((one.name for one in (self.base, self.tuned) if name not in one), None)
            if lacking is not None:
                left_out[name] = f"{lacking} lacks it"
                continue
            dtypes = [one.files[name].entries[name].dtype for one in (self.base, self.tuned)]
            if not all(dtype.is_floating_point for dtype in dtypes):
                left_out[name] = "its numbers are no floating-point numbers"
                continue
            old, new = self.base.shape(name), self.tuned.shape(name)
            if old != new:
                if len(old) < 2 or old[1:] != new[1:]:
                    raise ModelError(
                        f"{name} is {list(old)} in {self.base.name} and {list(new)} in {self.tuned.name}; give a model "
                        "and what was finetuned from it"
                    )
                left_out[name] = f"only the rows that both have count: {list(old)} became {list(new)}"
            shapes[name] = (min(old[0], new[0]), *old[1:]) if old else ()
        if not shapes:
            raise ModelError(f"{self.tuned.name} has no tensor of {self.base.name}; give its own base model")
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "left_out", left_out)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Difference`; [stop - start, ...]."""
        parts = []
        for one in (self.tuned, self.base):
            file = one.files[name]
            parts.append((file.rows(name, start, stop) if self.shapes[name] else file.read(name).reshape(1)).float())
        return parts[0].sub_(parts[1])


class AdapterDifference:
    """What a LoRA adds, B A times its scale, kept as the two factors.

    Args:
        folder: what PEFT's `save_pretrained` wrote.

    Attributes:
        digest: of its weights and its config.

    Raises:
        ModelError: it is no LoRA, changes more than products of two matrices can (DoRA, biases, whole modules), or is
            damaged.
    """

    def __init__(self, folder: Path) -> None:
        config = _adapter_config(folder)
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
        """See `Difference`; [stop - start, i]."""
        a, b = self._factors[name]
        return (b @ a[:, start:stop]).T if self._transposed else b[start:stop] @ a


class StateDifference:
    """Finetuned minus base of state dicts, computed when it is made and kept in memory.

    Args:
        base: name to tensor of any shape, of the model as it was; tensors that are one count once.
        tuned: the same, finetuned.

    Raises:
        ModelError: they share no floating-point tensor, or one has another shape.
    """

    def __init__(self, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
        # Computed now: what is in memory may have other values by the time that it is asked for.
        self._parts: dict[str, Tensor] = {}
        self.left_out: dict[str, str] = {}
        seen: dict[tuple[Any, ...], str] = {}
        for name in dict.fromkeys([*base, *tuned]):
            if name not in base or name not in tuned:
                self.left_out[name] = f"the {'base' if name not in base else 'finetuned model'} lacks it"
                continue
            old, new = base[name].detach(), tuned[name].detach()
            if not (old.is_floating_point() and new.is_floating_point()):
                self.left_out[name] = "its numbers are no floating-point numbers"
                continue
            place = tuple((one.data_ptr(), one.shape, one.stride(), one.device) for one in (old, new))
            if old.numel() and place in seen:
                self.left_out[name] = f"is {seen[place]}, which counts once"
                continue
            seen[place] = name
            if old.shape != new.shape:
                raise ModelError(
                    f"{name} is {list(old.shape)} before and {list(new.shape)} after; give its own base model"
                )
            self._parts[name] = new.to("cpu", torch.float32, copy=True).sub_(old.to("cpu", torch.float32))
        if not self._parts:
            raise ModelError("the two state dicts share no floating-point tensor; give a model and what it was made of")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to shape of what differs."""
        return {name: tuple(part.shape) for name, part in self._parts.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Difference`; [stop - start, ...]."""
        part = self._parts[name]
        return part[start:stop] if part.dim() else part.reshape(1)


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
