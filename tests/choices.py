"""Which tests run when: parameters that only `make slow` takes all of, and what a processor setting lacks."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch

__all__ = ["mostly_slow", "needs_bfloat16_attention"]


def mostly_slow(values: Iterable[Any], often: Collection[Any]) -> list[Any]:
    """Parameters, those that are not taken in every run marked as slow.

    Args:
        values: all of them.
        often: those of every run.
    """
    listed = list(values)
    assert set(often) <= set(listed), set(often) - set(listed)
    return [value if value in often else pytest.param(value, marks=pytest.mark.slow) for value in listed]


def _attends_in_bfloat16() -> bool:
    """Whether torch can; 2.13 raises with ATEN_CPU_CAPABILITY=avx2 on processors with AMX."""
    long = torch.zeros(1, 1, 64, 8, dtype=torch.bfloat16)
    try:
        torch.nn.functional.scaled_dot_product_attention(long, long, long)
    except RuntimeError:
        return False
    return True


needs_bfloat16_attention = pytest.mark.skipif(
    not _attends_in_bfloat16(), reason="torch's attention raises in bfloat16 at this instruction set"
)
