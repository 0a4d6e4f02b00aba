"""Whether a weight lies open: a plain floating-point parameter, by which its module computes just as it stands.

Quantised weights are told by what they are, not by the model's config: whole numbers, packed bits, or a tensor type of
their library that calls itself floating-point and takes no change (torchao) or loses it (quanto).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import ModelError
from steerkit.network.bare_copy import bare_copy, put_parameter

__all__ = ["hidden_weight", "is_plain", "observed_matrix", "refuse_packed"]

_ROWS = 256  # unit vectors that go through a layer at once
# Where a family's own layers are defined (DeepSeek-V4's grouped projection): not to be had by rows, and not quantised.
_FAMILIES = ("transformers.models.", "transformers_modules.")
_FINE = 2.0**-10  # beside 1 in one row: exact in every half type, lost in eight bits


def is_plain(module: nn.Module, leaf: str) -> bool:
    """Whether a change of a parameter's values is a change of what the module computes, digit by digit.

    Args:
        module: the parameter's owner, out of any adapter.
        leaf: the parameter's name in it; a bias that is absent counts as plain where the weight is.
    """
    value = getattr(module, leaf, None)
    value = getattr(module, "weight", None) if value is None else value
    if type(value) is not nn.Parameter or not value.is_floating_point() or value.itemsize < 2:
        return False
    own_class = isinstance(module, nn.Linear) and type(module) is not nn.Linear
    own_class = own_class and not type(module).__module__.startswith(_FAMILIES)
    return not own_class or leaf == "bias" or value.is_meta or _computes_with(module, value)


def hidden_weight(model: nn.Module) -> str | None:
    """The name of the first weight that is not plain; None where all are.

    Args:
        model: the transformers model.
    """
    for name, module in model.named_modules():
        leaves = [leaf for leaf, value in module._parameters.items() if value is not None]
        # A dynamically quantised layer has a method of that name, and no parameter.
        for leaf in ["weight"] if callable(getattr(module, "weight", None)) else leaves:
            if not is_plain(module, leaf):
                return f"{name}.{leaf}"
    return None


def refuse_packed(model: nn.Module) -> None:
    """Refuse a model whose parameters here are not all its weights: packed (`quantize_dynamic`), or split over ranks.

    Args:
        model: the transformers model.

    Raises:
        ModelError: there is such a weight; a change of every weight that writes would leave it out, or a part of it.
    """
    for name, module in model.named_modules():
        if callable(getattr(module, "weight", None)):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise ModelError(
                f"{name} is quantised ({kind}) and its weight is no parameter, so no change reaches it; steer with "
                "hooks, or load the model unquantised"
            )
        split = [leaf for leaf, value in module._parameters.items() if hasattr(value, "device_mesh")]
        if split:
            raise ModelError(
                f"{name}.{split[0]} is split over ranks (tensor parallelism or FSDP), so no one rank can change it; "
                "steer with hooks, or load the model whole"
            )


@torch.no_grad()
def observed_matrix(module: nn.Module, inputs: int, dtype: torch.dtype) -> Tensor:
    """The matrix by which a linear layer acts, column by column, from what it makes of the unit vectors.

    Args:
        module: the layer, of any make; it is run and nothing of it is changed.
        inputs: the width i of what it reads.
        dtype: in which to run it.

    Returns:
        [o, i] float32.
    """
    device = next((entry.device for entry in module.parameters() if not entry.is_meta), torch.device("cpu"))
    columns = []
    still = module(torch.zeros(1, inputs, dtype=dtype, device=device)).float()
    for start in range(0, inputs, _ROWS):
        size = min(_ROWS, inputs - start)
        units = torch.zeros(size, inputs, dtype=dtype, device=device)
        units[torch.arange(size), torch.arange(start, start + size)] = 1.0
        columns.append(module(units).float() - still)
    return torch.cat(columns).T


@torch.no_grad()
def _computes_with(module: nn.Module, weight: Tensor) -> bool:
    """Whether a linear layer of another class than torch's own computes with its weight and not with a coarse copy."""
    twin: Any = bare_copy(module)
    probe = torch.zeros_like(weight)
    probe[:, 0], probe[:, 1:2] = 1.0, _FINE
    put_parameter(twin, "weight", probe)
    if module._parameters.get("bias") is not None:
        put_parameter(twin, "bias", torch.zeros_like(twin.bias))
    rows = torch.eye(2, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        found = twin(rows)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(found, Tensor) and torch.equal(found, torch.nn.functional.linear(rows, probe))
