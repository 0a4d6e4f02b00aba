"""`random_signs`: a task vector with nothing learned in it, as a control for what scales of the real one do.

    tau'_ij = s_i tau_ij,   s_i = 1 or -1 at random        i counts rows, of a matrix [o, i] what it gives

A calibration has random directions of the vector's norm beside it, and Ilharco et al. (2023, arXiv 2212.04089) random
tensors of the same norm in each layer. Finetuning reads what activations have, and random tensors hardly do. With signs
by row each input changes each output of a linear layer by as much as the task vector does, and all norms and singular
values stay; only where the change points is left to chance. At one norm, a LoRA that taught the embedded model pirate
speech (8 steps, as in `benchmarks.finetune`) costs a KL divergence of 0.57 nats per token when it is taken away again,
with random signs 0.011, and random tensors 0.002: so what is compared is turned to one cost first
(`steerkit.tuning.calibrating`).

Of a tensor whose rows are not outputs (embeddings, GPT-2's transposed layers) the rows' own changes are turned round,
of one with a single dimension each number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from steerkit.tuning.task_vector import TaskVector, Term

__all__ = ["random_signs"]


def random_signs(vector: TaskVector, *, seed: int) -> TaskVector:
    """The same task vector with a random sign for each row of each difference.

    Args:
        vector: the vector to imitate.
        seed: fixes the signs, tensor by tensor, in whatever pieces they are asked for.
    """
    return TaskVector((Term(_Signed(vector, seed)),))


@dataclass(frozen=True, eq=False)
class _Signed:
    """A difference whose rows are those of a task vector, some of them turned round."""

    vector: TaskVector
    seed: int

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to shape of what differs."""
        return {name: shape for name, shape in self.vector.shapes.items() if self.vector.touches(name)}

    @property
    def left_out(self) -> Mapping[str, str]:
        """Name to why a tensor does not count."""
        return self.vector.left_out

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Difference`; [stop - start, ...]."""
        shape = self.shapes[name]
        found = self.vector.rows(name, torch.zeros(stop - start, *shape[1:], dtype=torch.float32), start)
        size = (*shape[:-1], 1) if len(shape) > 1 else (shape or (1,))
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        signs = torch.randint(2, (math.prod(size),), generator=draw, dtype=torch.int8).view(size)
        return found.mul_(2 * signs[start:stop] - 1)
