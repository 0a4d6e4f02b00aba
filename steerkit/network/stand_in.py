"""A model's architecture without its weights, for what is found by structure while the weights run elsewhere."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from steerkit.errors import ModelError
from steerkit.model import quiet

__all__ = ["stand_in", "without_weights"]

_PATTERN = 2**16


def stand_in(config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """A model of transformers that takes no more memory than its largest weight, and runs, on nonsense.

    All weights lie on one another. They are random, since what a block consists of is told by which of its tensors are
    equal.

    Args:
        config: of a decoder in transformers.
        trust_remote_code: as transformers has it.

    Raises:
        ModelError: transformers knows no such decoder.
    """
    model = without_weights(config, torch.float32, trust_remote_code=trust_remote_code)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    memory = _memory(max(one.numel() for one in parameters.values()))
    for name, one in parameters.items():
        path, _, leaf = name.rpartition(".")
        values = memory[: one.numel()].view(one.shape).to(one.dtype)
        model.get_submodule(path)._parameters[leaf] = nn.Parameter(values, requires_grad=False)
    return model


def without_weights(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """A model of transformers, in evaluation mode, whose parameters are empty; its buffers are there.

    Args:
        config: of a decoder in transformers.
        dtype: of its parameters.
        trust_remote_code: as transformers has it.

    Raises:
        ModelError: transformers knows no such decoder.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False), _LargeOnMeta(), quiet():
            model: nn.Module = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (ValueError, ImportError) as error:
        said = str(error).splitlines()[0]
        raise ModelError(
            f"{config.model_type}: transformers builds no decoder of it ({said}); take a model that it can load"
        ) from None
    return model.eval()


class _LargeOnMeta(TorchFunctionMode):
    """Large tensors that are made empty, as parameters are, take no memory from the first.

    accelerate lets each be made and then forgets it; the C library keeps many of those as address space of the process.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = dict(kwargs or {})
        if func is torch.empty and args and math.prod(args if isinstance(args[0], int) else args[0]) > _PATTERN:
            made["device"] = "meta"
        return func(*args, **made)


def _memory(size: int) -> Tensor:
    pattern = torch.randn(_PATTERN, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 0.1
    return pattern.repeat(-(-size // _PATTERN))[:size]
