"""A LoRA adapter on the disk: written under the names that peft has for its parts, and loaded as anybody would."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import SiteError
from steerkit.export.adapter_parts import AdapterParts
from steerkit.model import hub_id
from steerkit.vector.model_identity import model_facts

__all__ = ["loaded_adapter", "write_files"]

_PREFIX = "base_model.model."


def write_files(model: Any, parts: AdapterParts, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        model: the transformers model.
        parts: the pieces of the adapter.
        folder: where they go.
    """
    from peft import LoraConfig
    from safetensors.torch import save

    rank = parts.rank
    modules = list(dict.fromkeys([*parts.linear, *parts.biases, *parts.embeddings]))
    name = model_facts(model)["model_id"]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=modules or [],
        target_parameters=list(parts.stacks) or None,
        modules_to_save=list(parts.whole) or None,
        lora_bias=bool(parts.biases),
        fan_in_fan_out=any(type(model.get_submodule(path)).__name__ == "Conv1D" for path in modules),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=None if name is None else hub_id(name),
    )
    config.save_pretrained(str(folder))
    content = save(_tensors(model, parts, rank), metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").write_bytes(content)


def _tensors(model: nn.Module, parts: AdapterParts, rank: int) -> dict[str, Tensor]:
    """The pieces under the names peft has for them, all of one rank."""
    found: dict[str, Tensor] = {}
    for path in dict.fromkeys([*parts.linear, *parts.biases]):
        module = model.get_submodule(path)
        if path in parts.linear:
            left, right = _padded(*parts.linear[path], rank)
        else:
            width_in, width_out = _widths(module)
            left, right = (
                torch.zeros(width_out, rank, dtype=torch.float32),
                torch.zeros(rank, width_in, dtype=torch.float32),
            )
        found |= {f"{path}.lora_A.weight": right, f"{path}.lora_B.weight": left}
        if parts.biases:
            found[f"{path}.lora_B.bias"] = parts.biases.get(path, torch.zeros(len(left), dtype=torch.float32))
    for path, pair in parts.embeddings.items():
        left, right = _padded(*pair, rank)
        found |= {f"{path}.lora_embedding_A": right, f"{path}.lora_embedding_B": left}
    for name, pair in parts.stacks.items():
        left, right = _padded(*pair, rank)
        if left.dim() == 3:  # peft counts ranks within experts in A, and experts within ranks in B
            left, right = left.permute(1, 2, 0).flatten(1), right.flatten(0, 1)
        path = name.rpartition(".")[0]
        found |= {f"{path}.lora_A.weight": right, f"{path}.lora_B.weight": left}
    found |= {f"{path}.weight": value for path, value in parts.whole.items()}
    return {f"{_PREFIX}{name}": value.contiguous().clone() for name, value in found.items()}


def _padded(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Both factors, [out, r] and [r, in], widened with zeros to the wanted rank: their product stays."""
    more = rank - left.shape[-1]
    return nn.functional.pad(left, (0, more)), nn.functional.pad(right, (0, 0, 0, more))


def _widths(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if type(module).__name__ == "Conv1D":
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


@contextlib.contextmanager
def loaded_adapter(model: Any, parts: AdapterParts, folder: Path) -> Iterator[nn.Module]:
    """Load the adapter onto the model with peft; after the context the model is as it was.

    Args:
        model: the transformers model.
        parts: what the adapter has to hold.
        folder: where it lies.

    Yields:
        The model with the adapter on it.

    Raises:
        SiteError: peft refuses the adapter, or leaves out a module of it.
    """
    from peft import PeftModel

    attributes, modules = set(vars(model)), dict(model.named_modules())
    training = [module for module in modules.values() if module.training]
    needs = {name: value.requires_grad for name, value in model.named_parameters()}
    try:
        with warnings.catch_warnings():
            # peft tells of merging into layers without a bias, and asks for an attribute that transformers 5 renames.
            warnings.simplefilter("ignore")
            try:
                adapted = PeftModel.from_pretrained(model, str(folder))
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise SiteError(f"peft refuses this adapter ({reason}); bake it, or steer with hooks") from error
            _check_adapted(adapted, parts)
            yield adapted
    finally:
        # Not by `unload`, which leaves modules that are stored whole in the place of the model's own.
        for name, module in modules.items():
            owner, _, leaf = name.rpartition(".")
            if name and getattr(modules[owner], leaf) is not module:
                setattr(modules[owner], leaf, module)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for name, value in model.named_parameters():
            value.requires_grad_(needs[name])
        for module in training:  # peft switches all of them over
            module.training = True


def _check_adapted(adapted: nn.Module, parts: AdapterParts) -> None:
    """Refuse where peft has left out a module that was named.

    Raises:
        SiteError: it has.
    """
    from peft.tuners.lora import LoraLayer

    found = {name.removeprefix(_PREFIX) for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    for name in (*parts.linear, *parts.biases, *parts.embeddings):
        if name not in found:
            raise SiteError(f"peft leaves out `{name}` of this architecture; bake it, or steer with hooks")
