"""The pieces of a LoRA adapter: which parameter changes become low-rank pairs, biases or whole modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import SiteError
from steerkit.export.range_finder import low_rank
from steerkit.export.weight_changes import Change
from steerkit.network.plain_weights import is_plain, observed_matrix
from steerkit.network.stored_tensors import stored

__all__ = ["AdapterParts", "parts_for"]


@dataclass
class AdapterParts:
    """The pieces of an adapter, by the name of what they adapt."""

    linear: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Linear layers: B [out, r], A [r, in]."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """Linear layers: what their bias gains [out]."""
    embeddings: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Embeddings: B [d, r], A [r, vocabulary]."""
    stacks: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Parameters of experts: B [(n,) out, r], A [(n,) r, in]."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Modules with one weight: its new values."""

    @property
    def rank(self) -> int:
        """The largest rank of them all."""
        found = (right.shape[-2] for part in (self.linear, self.embeddings, self.stacks) for _, right in part.values())
        return max(found, default=0) or 1


def parts_for(model: nn.Module, changes: Mapping[str, Change]) -> AdapterParts:
    """Turn the changes of parameters into the pieces of an adapter.

    Raises:
        SiteError: peft has no form for them.
        StrengthError: a rank is too high.
    """
    parts = AdapterParts()
    # peft takes a linear layer for the experts whose stack bears its name, unless it goes as a parameter as well.
    stacked = {name.rpartition(".")[2] for name, value in model.named_parameters() if value.dim() == 3}
    has_biases = any(_is_linear_bias(model, name) for name in changes)
    for name, change in changes.items():
        path, _, leaf = name.rpartition(".")
        module, old = model.get_submodule(path), _values(model, name)
        with torch.no_grad():
            new = change(old)
        if _is_linear_bias(model, name):
            parts.biases[path] = new if old is None else new - old
            continue
        assert old is not None
        size = float(torch.maximum(old.abs().max(), new.abs().max()))
        if isinstance(module, nn.Embedding) and leaf == "weight":
            if has_biases or type(module) is not nn.Embedding:  # one of another class is called in another way
                parts.whole[path] = new
            else:
                rows, columns = low_rank(new - old, size)
                parts.embeddings[path] = columns.mT, rows.mT
        elif _is_linear(module) and leaf == "weight" and path.rpartition(".")[2] not in stacked:
            left, right = low_rank(new - old, size)
            parts.linear[path] = (right.mT, left.mT) if _inputs_first(module) else (left, right)
        elif old.dim() in (2, 3):
            left, right = low_rank(new - old, size)
            parts.stacks[name] = (right.mT, left.mT) if _inputs_first(module) and old.dim() == 3 else (left, right)
        else:
            raise SiteError(f"{name}: an adapter has no form for this parameter; bake it, or steer with hooks")
    if parts.stacks and parts.biases:
        raise SiteError(
            f"`{next(iter(parts.stacks))}` and the bias of `{next(iter(parts.biases))}` both change, and peft has no "
            "adapter for experts and biases in one; bake it, or steer with hooks"
        )
    owners = [name.rpartition(".")[0] for name in parts.stacks]
    if len(set(owners)) < len(owners):
        raise SiteError(
            f"two parameters of `{owners[0]}` change, for which peft has no plain form; bake it, or steer with hooks"
        )
    return parts


def _values(model: Any, name: str) -> Tensor | None:
    """A parameter in float32; a quantised weight as its layer acts."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    # Not by peft's `dequantize_module_weight`, after which an 8-bit layer of bitsandbytes does not run on a CPU.
    if leaf == "weight" and isinstance(module, nn.Linear) and not is_plain(module, leaf):
        return observed_matrix(module, module.in_features, model.dtype).cpu()
    old = stored(model, name)
    return None if old is None else old.float().cpu()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_linear_bias(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "bias" and _is_linear(model.get_submodule(path))


def _inputs_first(module: nn.Module) -> bool:
    """Whether a weight is held as [in, out]: GPT-2's linear layers, GPT-OSS's experts."""
    return type(module).__name__ == "Conv1D" or bool(getattr(module, "is_transposed", False))
