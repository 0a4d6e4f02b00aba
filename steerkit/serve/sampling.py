"""`Sampler`: how the next token of one row is chosen.

    greedy     argmax l
    drawn      argmax log p - log E,    p = softmax of l / temperature, cut to top-k and top-p,    E exponential

The second is a draw from p (Gumbel's trick), with numbers of the row's own generator: what is answered beside a row
moves its logits by rounding alone, and that moves this maximum little. `temperature`, `top_k` and `top_p` are
transformers' own logits processors.
"""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from steerkit.generation import exponential_noise
from steerkit.serve.request import Request

__all__ = ["Sampler"]


class Sampler:
    """Chooses the tokens of one row.

    Args:
        request: whose settings count.
        choice: which of its answers.
    """

    def __init__(self, request: Request, choice: int) -> None:
        self.is_greedy = request.temperature == 0
        if self.is_greedy:
            return
        seed = secrets.randbits(63) if request.seed is None else request.seed
        self._generator = torch.Generator().manual_seed((seed + choice) % 2**63)
        cuts: list[Any] = [TemperatureLogitsWarper(float(request.temperature))]
        if request.top_k:
            cuts.append(TopKLogitsWarper(request.top_k))
        if request.top_p < 1.0:
            cuts.append(TopPLogitsWarper(request.top_p))
        self._cut = LogitsProcessorList(cuts)

    def draw(self, logits: Tensor) -> Tensor:
        """The next token.

        Args:
            logits: [v] float32.

        Returns:
            [] int64 on the same device.
        """
        if self.is_greedy:
            return logits.argmax()
        # None of these processors looks at the ids so far.
        cut: Tensor = self._cut(None, logits[None])[0]
        return (cut - exponential_noise(self._generator, logits.shape[-1]).to(cut.device)).argmax()
