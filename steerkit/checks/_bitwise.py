"""How two results are compared, and what a steering may leave on a model: shared by conformance checks and doctor."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

__all__ = ["bitwise", "hooks_of", "largest_gap", "raise_error"]


def bitwise(one: Tensor, other: Tensor) -> bool:
    """Compare two tensors so that -0.0 is not +0.0, which `torch.equal` calls equal.

    Args:
        one: [...] of any shape.
        other: [...] of any shape.

    Returns:
        Whether every bit is the same.
    """
    return torch.equal(one, other) and torch.equal(torch.signbit(one), torch.signbit(other))


def largest_gap(one: Tensor, other: Tensor) -> float:
    """Find the largest difference, in units of the other's largest value.

    Args:
        one: [...] of any shape.
        other: [...] of the same shape.

    Returns:
        The difference; nan where a value is.
    """
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-9))


def hooks_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Count the forward hooks and pre-hooks of every module, by its name.

    Args:
        model: the model.
    """
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    }


def raise_error(*_: Any) -> NoReturn:
    """Fail inside of a steering context, as a hook or by itself.

    Raises:
        ZeroDivisionError: always.
    """
    raise ZeroDivisionError
