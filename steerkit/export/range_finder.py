"""A matrix of low rank taken apart into two thin ones, by a randomised range finder."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steerkit._support.precision import full_precision
from steerkit.errors import StrengthError

__all__ = ["low_rank"]

_MAX_RANK = 256


@full_precision()
def low_rank(change: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Factorise a matrix of low rank into two thin ones.

    Args:
        change: [..., o, i] float32, the difference of two matrices.
        size: the largest entry of those matrices, whose rounding is in the difference.

    Returns:
        Left [..., o, r] and right [..., r, i], whose product it is; r is 0 if there is nothing but rounding.

    Raises:
        StrengthError: the rank is above 256.
    """
    rows, columns = change.shape[-2:]
    noise = 4 * torch.finfo(torch.float32).eps * size * (math.sqrt(rows) + math.sqrt(columns))
    generator, width = torch.Generator().manual_seed(0), 8
    while True:
        width = min(width, rows, columns)
        drawn = torch.randn(columns, width, generator=generator, dtype=torch.float32).to(change)
        basis = torch.linalg.qr(change @ drawn).Q
        left, sizes, right = torch.linalg.svd(basis.mT @ change, full_matrices=False)
        rank = int((sizes > noise).sum(-1).max())
        if rank > _MAX_RANK:
            raise StrengthError(f"the change of a weight has rank above {_MAX_RANK}, too high for an adapter; bake it")
        if rank < width or width == min(rows, columns):
            return (basis @ left[..., :rank]).contiguous(), sizes[..., :rank, None] * right[..., :rank, :]
        width *= 4
